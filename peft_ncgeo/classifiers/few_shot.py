"""Few-shot classification of images by the nearest class prototype."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.head_names import CLASS_NAMES
from ..data.processors import find_processor
from ..files import file_name, parse_json
from ..geometry.contrast import TEMPERATURE, check_temperature
from ..geometry.heads import Heads
from ..loading.adapter_folder import refuse_model_folder, weights_digest, writing_adapter
from ..loading.load import PROTOTYPES, fetch_adapter, load_adapter
from ..models.adapters import unwrap
from ..models.snapshots import unchanged_on_error
from ..models.tensor_files import check_tensors, read_shapes
from ..tuners.copa import CoPAConfig, CoPALayer, Residual
from ..validation import one_line, short_repr
from .image_features import ImageFeatures, check_rows

_HEADS = "adapter_sha256"  # key in that file's header: digest of the heads that the prototypes belong to


class FewShotClassifier:
    r"""Classifier of image features by class prototypes, each through a head: `argmax_c cos(x Theta_I, P_c Theta_P)`.

    Made by [`~peft_ncgeo.adapt`]. It holds copies of the trained weights, so adapting the model to other classes later
    does not change it; the frozen backbone is shared.

    Args:
        model: the backbone, as passed to `adapt`.
        heads: Theta_I and Theta_P, each (d, d).
        prototypes: P, (K, d), mean features of the classes' support images.
        classes: names of the K classes, numbers or words, which `predict` returns.
        temperature: tau, 1e-6 to 1e6, the divisor of the cosines.
        processor: the backbone's image processor. Default: loaded from the base model's name or path.
        weights: trained tensors of the backbone's adapter, by their names in `model`.
        metrics: `loss`, `gap_before` and `gap_after` of the adaptation.
        adaptation: arguments of `adapt`, for a model card.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Heads,
        prototypes: Tensor,
        classes: Sequence[Any],
        temperature: float = TEMPERATURE,
        processor: Any = None,
        weights: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, float] | None = None,
        adaptation: Mapping[str, Any] | None = None,
    ) -> None:
        if len(prototypes) != len(classes):
            raise ValueError(
                f"There are {len(prototypes)} prototypes for {len(classes)} classes; pass one for each class."
            )
        self.model, self.heads, self.prototypes = model, heads, prototypes
        self.classes, self.temperature = list(classes), check_temperature(temperature)
        self.metrics, self.adaptation = dict(metrics or {}), dict(adaptation or {})
        self._encoder = ImageFeatures(model, processor)
        self._weights = dict(weights or {})
        self._adapter = next((name.rpartition(".")[2] for name in self._weights), None)

    @property
    def adapter_name(self) -> str | None:
        """Name of the model's adapter that was trained with this classifier; None if there is none."""
        return self._adapter

    @property
    def processor(self) -> Any:
        """Image processor, if one was given or already looked up."""
        return self._encoder.processor

    @property
    def changes_backbone(self) -> bool:
        """True if residual adapters were trained with the heads, which changes the backbone's features."""
        return any(".ncgeo_copa_residual." in name for name in self._weights)

    def features(self, images: Any, batch_size: int = 64) -> Tensor:
        """Return features (N, d) before the head, of PIL images or pixels (N, C, H, W).

        Raises:
            TypeError, ValueError: an input that is not an image or cannot be read; features that are not finite;
                residual adapters of this classifier that are no longer in the model.
        """
        features = self._encoder.embed(images, batch_size, self._residual_maps())
        check_rows(features, "features of image", range(len(features)))
        return features

    def _residual_maps(self) -> dict[str, nn.Module]:
        """Return the backbone's residual maps by module path, with this classifier's weights, or inactive ones."""
        backbone = unwrap(self.model)
        inside = next(name for name, module in self.model.named_modules() if module is backbone)
        maps: dict[str, nn.Module] = {}
        left = {name for name in self._weights if ".ncgeo_copa_residual." in name}
        for path, module in backbone.named_modules():
            if isinstance(module, Residual):
                name = f"{inside}.{path}.ncgeo_copa_residual.{self._adapter}".removeprefix(".")
                known = str(self._adapter) in module.ncgeo_copa_residual
                maps[path] = module.with_weight(self._weights.get(name) if known else None)
                left -= {name} if known else set()
        if left:
            raise ValueError(f"The adapter {self._adapter!r} is no longer in the model; load the classifier again.")
        return maps

    @torch.no_grad()
    def predict_proba(self, images: Any, batch_size: int = 64) -> Tensor:
        """Return class probabilities (N, K), `softmax_c(cos(x Theta_I, P_c Theta_P) / tau)`, float32 on the CPU."""
        return (self._cosines(images, batch_size) / self.temperature).softmax(-1).float().cpu()

    def predict(self, images: Any, batch_size: int = 64) -> list[Any]:
        """Return the class with the nearest prototype for each image."""
        return [self.classes[i] for i in self._cosines(images, batch_size).argmax(-1).tolist()]

    @torch.no_grad()
    def _cosines(self, images: Any, batch_size: int) -> Tensor:
        features = self.features(images, batch_size)
        return self.heads.scores(features.to(self.prototypes.dtype), self.prototypes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a PEFT adapter, which [`from_pretrained`] and `PeftModel.from_pretrained` read, and the prototypes.

        As in PEFT, an adapter with another name than "default" is written into a subfolder of that name.

        Raises:
            ValueError: the model has no `CoPAConfig` adapter to write into; the classes are not all numbers or words;
                or the folder holds a model.
        """
        if not isinstance(self.model, PeftModel) or self._adapter is None:
            raise ValueError(
                "Only a PeftModel's heads can be saved: adapt get_peft_model(backbone, CoPAConfig()) instead."
            )
        if not all(isinstance(name, str | int) for name in self.classes):
            raise ValueError(f"Classes must be numbers or words to be saved, got {self.classes}.")
        file_name(self._adapter, "an adapter")  # PEFT names a folder after it
        refuse_model_folder(folder)
        tensors = {**self.model.state_dict(), **self._weights}
        prototypes = {"prototypes": self.prototypes.contiguous().cpu()}
        with writing_adapter(folder, [CLASS_NAMES]) as part:
            self.model.save_pretrained(str(part), selected_adapters=[self._adapter], state_dict=tensors)
            place = part / (self._adapter if self._adapter != "default" else "")
            told = {"classes": json.dumps(self.classes), _HEADS: weights_digest(place)}
            save_file(prototypes, place / PROTOTYPES, told)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | Path,
        base_model: nn.Module | str | None = None,
        processor: Any = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> FewShotClassifier:
        """Load a saved classifier from a folder or a Hub repository, onto its base model.

        Raises:
            OSError, ValueError: as [`~peft_ncgeo.hub.load_adapter`]; or the adapter is of another type, or has no
                prototypes.
        """
        folder = fetch_adapter(repo_id, revision, token)
        with unchanged_on_error(base_model):
            model = load_adapter(folder, base_model, token=token)
            config: Any = model.peft_config[model.active_adapter]
            if not isinstance(config, CoPAConfig):
                raise ValueError(f"{repo_id} holds a {config.peft_type.value} adapter, not one of type NCGEO_COPA.")
            prototypes, classes = _read_prototypes(folder, repo_id)
            layer: Any = copa_layer(model)
            heads = Heads(*(head.detach().to(prototypes.dtype, copy=True) for head in layer.heads))
            if prototypes.dim() != 2 or prototypes.shape[1] != layer.width:
                raise ValueError(
                    f"{PROTOTYPES} in {repo_id} has shape {tuple(prototypes.shape)}, but the model's features have "
                    f"width {layer.width}."
                )
            prototypes = prototypes.to(heads.image.device)
            processor = processor or find_processor(model, folder, images_only=True, token=token)
            temperature: Any = config.temperature
            return cls(model, heads, prototypes, classes, temperature, processor, copa_weights(model))


def _read_prototypes(folder: Path, repo_id: str | Path) -> tuple[Tensor, list[Any]]:
    """Read the prototypes (K, d) saved beside an adapter, and the names of their classes."""
    if not (folder / PROTOTYPES).is_file():
        raise ValueError(f"{repo_id} has no {PROTOTYPES}; write it with FewShotClassifier.save_pretrained.")
    digest = weights_digest(folder)
    try:
        read_shapes(folder / PROTOTYPES)  # refuses unsupported dtypes before any number is read
        with safe_open(folder / PROTOTYPES, "pt") as file:
            told = file.metadata()
            classes = parse_json(told["classes"])
            prototypes = file.get_tensor(
                "prototypes"
            ).clone()  # a copy, because the tensor maps the file and changes with it
        check_tensors({"prototypes": prototypes})
        if told.get(_HEADS, digest) != digest:  # version 0.1.0 did not write it
            raise ValueError(f"it belongs to other heads than {SAFETENSORS_WEIGHTS_NAME}; save both again")
        known = isinstance(classes, list) and all(isinstance(name, str | int) for name in classes)
        if not known or len(set(classes)) < max(2, len(classes)):
            raise ValueError(f"its classes are {short_repr(classes)}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{PROTOTYPES} in {repo_id} is damaged: {one_line(error)}") from error
    return prototypes, classes


def copa_layer(model: nn.Module) -> CoPALayer | None:
    """Return the heads of a model's active [`~peft_ncgeo.CoPAConfig`] adapter, or None."""
    layers = [module for module in model.modules() if isinstance(module, CoPALayer) and module.active_name]
    return layers[0] if layers else None


def copa_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the active adapter's heads and residual maps, by their names in the model."""
    layer = copa_layer(model)
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if layer is not None and ".ncgeo_copa_" in name and name.endswith(f".{layer.active_name}")
    }
