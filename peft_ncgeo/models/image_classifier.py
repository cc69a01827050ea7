"""Image tower with a linear or cosine head: its config, and the model that Transformers' auto classes load."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..validation import check_int, check_positive, short_repr
from .batch_norm import SharedBatchNorm
from .cosine_head import CosineHead

HEADS = ("linear", "cosine")
POOLINGS = ("pooler_output", "first_token", "mean")


class ImageClassifierConfig(PreTrainedConfig):
    """Config of an [`ImageClassifierModel`].

    Args:
        vision_class: name of the tower's class in Transformers, such as "CLIPVisionModel".
        vision_config: the tower's config.
        pooling: "pooler_output" for the tower's own pooling; "first_token" or "mean" of its last hidden state's
            tokens.
        hidden_size: width of the pooled feature.
        projection_dim: width of the feature after a linear projection. Default: the feature is not projected.
        projector_dim: width of the feature after a projector (linear, batch norm, ReLU, linear); the inner layer has
            the same width. Default: there is no projector.
        head: "linear" or "cosine".
        scale: scale s of the cosines.
    """

    model_type = "ncgeo_image_classifier"
    has_no_defaults_at_init = True
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": PreTrainedConfig}

    vision_class: str | None = None
    vision_config: Any = None
    pooling: str = "pooler_output"
    hidden_size: int | None = None
    projection_dim: int | None = None
    projector_dim: int | None = None
    head: str = "linear"
    scale: float = 25.0

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = find_vision_class(self.vision_class).config_class.from_dict(self.vision_config)
        check_choice("head", self.head, HEADS)
        check_choice("pooling", self.pooling, POOLINGS)
        self.scale = check_positive("scale", self.scale)
        super().__post_init__(**kwargs)

    @property
    def feature_size(self) -> int:
        """Width d of the features that the head takes."""
        return check_int("hidden_size", self.projector_dim or self.projection_dim or self.hidden_size, least=1)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError if a value is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={short_repr(value)} must be one of {', '.join(map(repr, choices))}.")


def find_vision_class(name: Any) -> Any:
    """Return the class of Transformers with this name.

    Raises:
        ValueError: Transformers has no model of this name.
    """
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"vision_class={short_repr(name)} must be the name of a model class of Transformers.")
    return found


class ImageClassifierModel(PreTrainedModel):
    r"""Image tower, pooling, and a head `classifier`; saved, loaded and used as an ...ForImageClassification model.

    The feature f is made from the tower's pooled feature v: f = P v if the tower of a dual encoder has a projection P,
    else f = v. A student that learns from another model's texts maps it into their space by a projector,
    f = projector(P v). The logits are

    .. math:: z_k = w_k \cdot f + b_k \quad \text{(linear)}, \qquad z_k = s \cos(f, w_k) \quad \text{(cosine)}

    `AutoModelForImageClassification` and `pipeline("image-classification")` load it from a folder after
    `import peft_ncgeo`. [`~peft_ncgeo.ImageClassifier.from_backbone`] makes one.
    """

    config_class = ImageClassifierConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    # the tower's own class has the last word
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision_class = find_vision_class(config.vision_class)
        options = {}
        if config.pooling != "pooler_output" and "add_pooling_layer" in inspect.signature(vision_class).parameters:
            options["add_pooling_layer"] = False  # it would be trained by nothing
        self.backbone = vision_class._from_config(config.vision_config, **options)
        # a module in every case: methods that change the feature, such as CoPA, find it here
        projects = config.projection_dim is not None
        self.projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if projects else nn.Identity()
        )
        self.projector = self.new_projector()
        self.classifier = self.new_head()
        self.post_init()

    def new_projector(self) -> nn.Module:
        """Return a random projector of the config's width, or an identity if the config has none."""
        inner, width = self.config.projection_dim or self.config.hidden_size, self.config.projector_dim
        if width is None:
            return nn.Identity()
        return nn.Sequential(nn.Linear(inner, width), SharedBatchNorm(width), nn.ReLU(), nn.Linear(width, width))

    def new_head(self) -> CosineHead | nn.Linear:
        """Return a head of the config's kind, with weights that are not initialised yet."""
        width, classes = self.config.feature_size, self.config.num_labels
        if self.config.head == "cosine":
            return CosineHead(width, classes, self.config.scale)
        return nn.Linear(width, classes)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CosineHead):
            nn.init.normal_(module.weight, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def _pool(self, outputs: Any) -> Tensor:
        if self.config.pooling == "first_token":
            return outputs.last_hidden_state[:, 0]
        if self.config.pooling == "mean":
            return outputs.last_hidden_state.mean(1)
        return outputs.pooler_output.flatten(1)  # ResNet's is (B, d, 1, 1)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Return logits (B, K), and the mean cross-entropy if labels are given.

        Args:
            pixel_values: images in the form that the tower takes, usually (B, C, H, W).
            labels: (B,) class of each image.
            kwargs: other inputs of the tower, such as `pixel_attention_mask` or `interpolate_pos_encoding`.
        """
        outputs = self.backbone(pixel_values=pixel_values, **kwargs)
        logits = self.classifier(self.projector(self.projection(self._pool(outputs))))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )
