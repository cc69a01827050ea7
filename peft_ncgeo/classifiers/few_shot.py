"""Classify images by the nearest prototype of a few examples each."""

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
from ..validation import reason, shown
from .image_features import ImageFeatures, check_rows

_HEADS = "adapter_sha256"  # in that file's header: of the heads that the prototypes belong to


class FewShotClassifier:
    r"""Image features against class prototypes, each through its own head: `argmax_c cos(x Theta_I, P_c Theta_P)`.

    Made by [`~peft_ncgeo.adapt`]. It holds weights of its own, so that adapting the model to other classes later
    changes nothing here; the frozen backbone is shared.

    Args:
        model: the backbone, as `adapt` took it.
        heads: Theta_I and Theta_P, each (d, d).
        prototypes: P, (K, d), mean features of the classes' support images.
        classes: what the K classes are called, numbers or words; `predict` answers with them.
        temperature: tau, 1e-6 to 1e6, which divides the cosines.
        processor: the backbone's image processor. Default: the one that lies where the model came from.
        weights: trained tensors of the backbone's adapter, by their names in `model`.
        metrics: of the adaptation: `loss`, `gap_before`, `gap_after`.
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
            raise ValueError(f"There are {len(prototypes)} prototypes for {len(classes)} classes.")
        self.model, self.heads, self.prototypes = model, heads, prototypes
        self.classes, self.temperature = list(classes), check_temperature(temperature)
        self.metrics, self.adaptation = dict(metrics or {}), dict(adaptation or {})
        self._encoder = ImageFeatures(model, processor)
        self._weights = dict(weights or {})
        self._adapter = next((name.rpartition(".")[2] for name in self._weights), None)

    @property
    def adapter_name(self) -> str | None:
        """Of the adapter in the model that the classifier was trained as."""
        return self._adapter

    @property
    def processor(self) -> Any:
        """The image processor, where one was given or looked for."""
        return self._encoder.processor

    @property
    def changes_backbone(self) -> bool:
        """Whether residual adapters were trained with the heads, so that the frozen features are others."""
        return any(".ncgeo_copa_residual." in name for name in self._weights)

    def features(self, images: Any, batch_size: int = 64) -> Tensor:
        """Features (N, d) before the head, of PIL images or pixels (N, C, H, W).

        Raises:
            TypeError, ValueError: something that is no image or cannot be read; features that are not finite; the
                residual adapters that the classifier was trained with are no longer in the model.
        """
        features = self._encoder.embed(images, batch_size, self._residual_maps())
        check_rows(features, "features of image", range(len(features)))
        return features

    def _residual_maps(self) -> dict[str, nn.Module]:
        """Return the backbone's residual maps with this classifier's own weights, or inactive, by their places."""
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
            raise ValueError(f"The adapter {self._adapter!r} was taken out of the model; load the classifier again.")
        return maps

    @torch.no_grad()
    def predict_proba(self, images: Any, batch_size: int = 64) -> Tensor:
        """Class probabilities (N, K), `softmax_c(cos(x Theta_I, P_c Theta_P) / tau)`, float32 on the CPU."""
        return (self._cosines(images, batch_size) / self.temperature).softmax(-1).float().cpu()

    def predict(self, images: Any, batch_size: int = 64) -> list[Any]:
        """The class with the nearest prototype, for each image."""
        return [self.classes[i] for i in self._cosines(images, batch_size).argmax(-1).tolist()]

    @torch.no_grad()
    def _cosines(self, images: Any, batch_size: int) -> Tensor:
        features = self.features(images, batch_size)
        return self.heads.scores(features.to(self.prototypes.dtype), self.prototypes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a PEFT adapter, which [`from_pretrained`] and `PeftModel.from_pretrained` read, and the prototypes.

        As PEFT does, an adapter that is not named "default" goes into a folder of its name inside.

        Raises:
            ValueError: the model has no `CoPAConfig` adapter to write into; the classes are not all numbers or words;
                or the folder is a model's.
        """
        if not isinstance(self.model, PeftModel) or self._adapter is None:
            raise ValueError(
                "Only a PeftModel's heads can be saved: adapt get_peft_model(backbone, CoPAConfig()) to this end."
            )
        if not all(isinstance(name, str | int) for name in self.classes):
            raise ValueError(f"Classes must be numbers or words to be saved, got {self.classes}.")
        file_name(self._adapter, "an adapter")  # PEFT makes a folder of it
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
        """Load what [`save_pretrained`] wrote, from a folder or a Hub repository, onto its base model.

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
                    f"{PROTOTYPES} in {repo_id} has shape {tuple(prototypes.shape)}, the model {layer.width}."
                )
            prototypes = prototypes.to(heads.image.device)
            processor = processor or find_processor(model, folder, images_only=True, token=token)
            temperature: Any = config.temperature
            return cls(model, heads, prototypes, classes, temperature, processor, copa_weights(model))


def _read_prototypes(folder: Path, repo_id: str | Path) -> tuple[Tensor, list[Any]]:
    """Read the prototypes (K, d) that lie beside an adapter, and the names of their classes."""
    if not (folder / PROTOTYPES).is_file():
        raise ValueError(f"{repo_id} has no {PROTOTYPES}; write it with FewShotClassifier.save_pretrained.")
    digest = weights_digest(folder)
    try:
        read_shapes(folder / PROTOTYPES)  # refuses kinds of numbers before any is read
        with safe_open(folder / PROTOTYPES, "pt") as file:
            told = file.metadata()
            classes = parse_json(told["classes"])
            prototypes = file.get_tensor("prototypes").clone()  # else they are the file, and change with it
        check_tensors({"prototypes": prototypes})
        if told.get(_HEADS, digest) != digest:  # version 0.1.0 wrote none
            raise ValueError(f"it belongs to other heads than {SAFETENSORS_WEIGHTS_NAME}; save both again")
        known = isinstance(classes, list) and all(isinstance(name, str | int) for name in classes)
        if not known or len(set(classes)) < max(2, len(classes)):
            raise ValueError(f"its classes are {shown(classes)}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{PROTOTYPES} in {repo_id} is damaged: {reason(error)}") from error
    return prototypes, classes


def copa_layer(model: nn.Module) -> CoPALayer | None:
    """The active [`~peft_ncgeo.CoPAConfig`] adapter's heads in a model, or None."""
    layers = [module for module in model.modules() if isinstance(module, CoPALayer) and module.active_name]
    return layers[0] if layers else None


def copa_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the active adapter's heads and residual maps, by their names in the model."""
    layer = copa_layer(model)
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if layer is not None and ".ncgeo_copa_" in name and name.endswith(f".{layer.active_name}")
    }
