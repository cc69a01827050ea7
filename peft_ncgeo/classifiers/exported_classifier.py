"""CLIP for a fixed list of class names: image tower and text features, without text tower and adapters.

This file is copied into the folder of every export. It needs torch and transformers (5 or later), nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection
from transformers.modeling_outputs import ImageClassifierOutput


class ExportedClassifier(CLIPVisionModelWithProjection):
    r"""Image classifier whose head is the text features of its classes.

    With the image's projected feature f and the classes' text features `g_k` of length 1,

    .. math:: z_k = \exp(\texttt{logit\_scale}) \, \mathrm{unit}(f) \cdot g_k

    where f is also passed through a projector (linear, batch norm, ReLU, linear) if the config has a `projector_dim`.
    If the image tower has prompts, n vectors follow [CLS] and the patches from layer `prompt_layers[0]` on (0: the
    input); each further layer of `prompt_layers` overwrites them with its own.

    Weights, in addition to those of `CLIPVisionModelWithProjection`: `text_features` (K, d), `logit_scale` (),
    `prompts.{layer}` (n, width) and `projector`.

    Config, in addition to the fields of `CLIPVisionConfig`: `id2label` holds the class names, `prompt_layers` the
    layers with prompts (an empty list if there are none), `num_prompts` is n, `projector_dim` the width d behind a
    projector.
    """

    text_features: Tensor
    logit_scale: Tensor

    _auto_class = "AutoModelForImageClassification"  # saving copies this file and names it in config.json
    # Cosines are multiplied by 100: rounding to bfloat16 would change the logits by up to 0.4.
    _keep_in_fp32_modules_strict = ["text_features", "logit_scale"]  # noqa: RUF012  as Transformers declares it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        shape = config.num_prompts, config.hidden_size
        self.prompts = nn.ParameterDict({str(i): nn.Parameter(torch.zeros(shape)) for i in config.prompt_layers})
        inner, width = config.projection_dim, getattr(config, "projector_dim", None)
        layers = [nn.Linear(inner, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)] if width else []
        self.projector = nn.Sequential(*layers)
        # buffers: as parameters they would come first, and set the dtype of the model
        self.register_buffer("text_features", torch.zeros(config.num_labels, width or inner))
        self.register_buffer("logit_scale", torch.zeros(()))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast as torch does, but let `half()` and similar casts keep the two wide tensors' precision."""
        wide = {"text_features": self.text_features, "logit_scale": self.logit_scale}
        super()._apply(fn, recurse)
        for name, tensor in wide.items():
            cast = getattr(self, name)
            if cast.dtype.itemsize < tensor.dtype.itemsize:
                setattr(self, name, tensor.to(cast.device))
        return self

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Return logits (B, K) of pixels (B, C, H, W), in float32 or wider; `softmax(-1)` gives probabilities."""
        tower: Any = self.vision_model
        hidden_states = tower.pre_layrnorm(self._with_prompts(tower.embeddings(pixel_values), 0))
        for i, layer in enumerate(tower.encoder.layers):
            hidden_states = self._with_prompts(hidden_states, i) if i else hidden_states
            hidden_states = layer(hidden_states, attention_mask=None)
        features = self.projector(self.visual_projection(tower.post_layernorm(hidden_states[:, 0])))
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
            logits = self.logit_scale.exp() * features @ self.text_features.T
        return ImageClassifierOutput(logits=logits)

    def _with_prompts(self, hidden_states: Tensor, layer: int) -> Tensor:
        """Return the tokens (B, L, width) that enter a layer, the last n replaced by its prompts if it has any."""
        if layer not in self.config.prompt_layers:
            return hidden_states
        prompts = self.prompts[str(layer)].expand(hidden_states.shape[0], -1, -1)
        first = layer == self.config.prompt_layers[0]
        others = hidden_states if first else hidden_states[:, : -self.config.num_prompts]
        return torch.cat([others, prompts], dim=1)
