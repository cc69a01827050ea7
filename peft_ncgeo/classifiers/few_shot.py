"""Few-shot classification of images by the nearest class prototype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from ..data.class_prompts import list_names
from ..data.crops import check_num_test_views
from ..data.head_names import CLASS_NAMES
from ..data.processors import find_processor
from ..files import file_name
from ..geometry.contrast import TEMPERATURE, check_temperature
from ..geometry.heads import Heads
from ..loading.adapter_folder import refuse_model_folder, writing_adapter
from ..loading.load import HEAD, HEAD_FOLDER, PROTOTYPES, fetch_adapter, fetch_files, load_adapter
from ..models.adapters import evaluation_mode, unwrap
from ..models.snapshots import unchanged_on_error
from ..models.templates import spelled
from ..tuners.copa import CoPAConfig, CoPALayer, Residual
from ..validation import check_int, short_repr
from .base import ClosedSetClassifier, Scorer, Views
from .head_files import HeadFile, fixed_image, load_named_base, read_head, write_head
from .heads.base import FeatureHead, State
from .heads.copa import CoPA
from .heads.leave_one_out import describe_accuracy
from .image_features import ImageFeatures, ProjectedFeatures, check_pixels, check_rows
from .prototype_files import read_prototypes, write_prototypes
from .zero_shot import ZeroShotClassifier


class FewShotClassifier(ClosedSetClassifier):
    r"""Classifier of image features by class prototypes, each through a head: `argmax_c cos(x Theta_I, P_c Theta_P)`.

    [`~peft_ncgeo.adapt`] makes it. It holds copies of the trained weights, so a later adaptation of the model to other
    classes does not change it; the frozen backbone is shared.

    Args:
        model: the backbone, as passed to `adapt`.
        heads: Theta_I and Theta_P, each (d, d).
        prototypes: P, (K, d), mean features of the classes' support images.
        classes: names of the K classes, numbers or words, which `predict` returns.
        temperature: tau, 1e-6 to 1e6, the divisor of the cosines.
        processor: the backbone's image processor. Default: loaded from the base model's name or path.
        weights: trained tensors of the backbone's adapter, by their names in `model`.
        metrics: values that [`~peft_ncgeo.adapt`] measured.
        adaptation: arguments of `adapt`, for a model card.

    Raises:
        TypeError, ValueError: the numbers of prototypes and classes differ, the temperature is out of range, or the
            model's pooled feature is not known.
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

    def __repr__(self) -> str:
        parts = [type(self.method).__name__, f"{len(self.classes)} classes", describe_accuracy(self.metrics)]
        return f"{type(self).__name__}({', '.join(filter(None, parts))})"

    @property
    def method(self) -> CoPA | FeatureHead:
        """Method by which the classifier was adapted."""
        return CoPA()

    @property
    def adapter_name(self) -> str | None:
        """Name of the model's adapter that was trained with this classifier; None if there is none."""
        return self._adapter

    @property
    def processor(self) -> Any:
        """Image processor if one was given or already found, else None."""
        return self._encoder.processor

    @property
    def changes_backbone(self) -> bool:
        """True if residual adapters were trained with the heads, which changes the backbone's features."""
        return any(".ncgeo_copa_residual." in name for name in self._weights)

    def features(self, images: Any, batch_size: int = 64) -> Tensor:
        """Return features (N, d) before the head, of images or pixels (N, C, H, W).

        Raises:
            TypeError, ValueError: an input is not an image or cannot be read, features are not finite, or residual
                adapters of this classifier are no longer in the model.
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

    def _scorer(self, class_names: Sequence[str] | None) -> Scorer:
        names = self.classes if class_names is None else list_names(class_names)
        score, maps = self._scores_of(None if class_names is None else names), self._residual_maps()

        def scores(views: Views) -> Tensor:
            with evaluation_mode(self.model):
                return torch.stack([score(self._encoder(**view, modules=maps)) for view in views]).mean(0)

        return Scorer(names, scores, self.temperature)

    def _batches(self, images: Any, batch_size: int, num_test_views: int) -> Iterator[Views]:
        if not isinstance(images, Tensor):
            return super()._batches(images, batch_size, num_test_views)
        if check_num_test_views(num_test_views) > 1:
            raise ValueError(
                f"num_test_views={num_test_views} needs images that can be cropped, not pixels; pass paths, PIL "
                "images or uint8 arrays, or set num_test_views=1."
            )
        check_pixels(images)
        return ([{"pixel_values": part}] for part in images.split(check_int("batch_size", batch_size, least=1)))

    def _image_processor(self) -> Any:
        return self._encoder.image_processor()

    def _scores_of(self, class_names: list[str] | None) -> Callable[[Tensor], Tensor]:
        """Return the function of features (N, d) that gives their scores."""
        if class_names is not None:
            raise ValueError(
                "CoPA has prototypes for the classes of the support set alone; leave out class_names, or adapt with "
                "head=TipAdapter() or head=GaussianDiscriminant()."
            )
        return lambda features: self.heads.scores(features.to(self.prototypes.dtype), self.prototypes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the prototypes and a PEFT adapter, which [`from_pretrained`] and `PeftModel.from_pretrained` read.

        As in PEFT, an adapter whose name is not "default" is written into a subfolder of that name.

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
        with writing_adapter(folder, [CLASS_NAMES]) as part:
            self.model.save_pretrained(str(part), selected_adapters=[self._adapter], state_dict=tensors)
            place = part / (self._adapter if self._adapter != "default" else "")
            write_prototypes(place, self.prototypes, self.classes)

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

        A head on cached features is loaded as a [`HeadClassifier`]. If it was fitted on a tuned model, and stands in
        the folder `head` of that model's adapter, as `peft-ncgeo train` writes it, name the adapter's folder: the
        adapter is loaded too. Else pass the tuned model as `base_model`.

        Raises:
            OSError, ValueError: as [`~peft_ncgeo.hub.load_adapter`]; or the adapter is of another type or has no
                prototypes; or the file of a head is damaged or belongs to another model than `base_model`.
        """
        folder = fetch_files(repo_id, revision, token)
        if (folder / HEAD).is_file():
            if (folder / CONFIG_NAME).is_file():
                raise ValueError(f"{repo_id} holds both {HEAD} and {CONFIG_NAME}; take the head or the adapter out.")
            return HeadClassifier._load(folder, repo_id, base_model, processor, token)
        if (folder / HEAD_FOLDER / HEAD).is_file():
            with unchanged_on_error(base_model):
                model = load_adapter(folder, base_model, token=token)
                processor = processor or find_processor(model, folder, token=token)
                return HeadClassifier._load(folder / HEAD_FOLDER, repo_id, model, processor, token)
        folder = fetch_adapter(repo_id, revision, token)
        with unchanged_on_error(base_model):
            model = load_adapter(folder, base_model, token=token)
            config: Any = model.peft_config[model.active_adapter]
            if not isinstance(config, CoPAConfig):
                raise ValueError(f"{repo_id} holds a {config.peft_type.value} adapter, not one of type NCGEO_COPA.")
            prototypes, classes = read_prototypes(folder, repo_id)
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


class HeadClassifier(FewShotClassifier):
    """Few-shot classifier with a head on cached features of a dual encoder, such as Tip-Adapter.

    [`~peft_ncgeo.adapt`] with `head=...` makes it. The model is shared and does not change; the head's tensors are on
    the CPU. Several threads may use one classifier.

    Args:
        model: a dual encoder, or a `PeftModel` around one.
        head: the method with its settings.
        state: tensors that the head learned.
        classes: names of the K classes, which `predict` returns.
        processor: the model's processor, such as `CLIPProcessor`.
        template: text around a class name. Default: the adapter's own, else "a photo of a {}.".
        metrics: `loss` and `accuracy` on the support set, and the values that the head measured or chose.
        adaptation: arguments of `adapt`, for a model card.

    Raises:
        ValueError, TypeError: the model reads no texts, or the processor has no tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        head: FeatureHead,
        state: State,
        classes: Sequence[str],
        processor: Any,
        template: str | None = None,
        metrics: Mapping[str, float] | None = None,
        adaptation: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.head, self.state, self.classes = model, head, dict(state), list(classes)
        self.temperature = 1.0  # a head's scores are logits
        self.metrics, self.adaptation = dict(metrics or {}), dict(adaptation or {})
        self._encoder, self._weights, self._adapter = ProjectedFeatures(model, processor), {}, None
        with evaluation_mode(model):
            self._texts = ZeroShotClassifier(model, processor, template)

    @property
    def method(self) -> FeatureHead:
        """Head with its settings."""
        return self.head

    @property
    def template(self) -> str:
        """Text around a class name."""
        return self._texts.template

    def features(self, images: Any, batch_size: int = 64) -> Tensor:
        """Return unnormalized features (N, d) of images or pixels (N, C, H, W); see [`FewShotClassifier.features`]."""
        features = self._encoder.embed(images, batch_size)
        check_rows(features, "features of image", range(len(features)))
        return features

    def text_features(self, class_names: Sequence[str]) -> Tensor:
        """Return unnormalized text features (K, d) of names in the template, in float32 or wider on the CPU."""
        with evaluation_mode(self.model):
            found = self._texts.text_features(class_names).cpu()
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _scores_of(self, class_names: list[str] | None) -> Callable[[Tensor], Tensor]:
        state = self.state if class_names is None else self._state_for(class_names)
        kept = next(value.dtype for value in state.values() if value.is_floating_point())
        return lambda features: self.head.logits(state, features.to("cpu", kept))

    def knows(self, class_names: Sequence[str]) -> bool:
        """Return True if the head can choose among these names: it knows each of them, or takes new ones."""
        known = set(map(spelled, self.classes))
        return self.head.takes_new_names or all(spelled(name) in known for name in class_names)

    def _state_for(self, names: list[str]) -> State:
        """Return the head's state for these names."""
        places = {spelled(name): i for i, name in enumerate(self.classes)}
        if not self.knows(names):
            new = [name for name in names if spelled(name) not in places]
            raise ValueError(
                f"{type(self.head).__name__} has a weight for each trained class alone and cannot take the new name "
                f"{short_repr(new[0])}; use TipAdapter or GaussianDiscriminant."
            )
        trained = torch.tensor([places.get(spelled(name), -1) for name in names])
        return self.head.for_names(self.state, trained, self.text_features(names))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head, class names, template and a card, which [`FewShotClassifier.from_pretrained`] reads.

        Neither the model nor its adapter is written. Save an adapter first, and the head into the folder `head` in it:
        [`FewShotClassifier.from_pretrained`] of the adapter's folder loads both.

        Raises:
            ValueError: the folder holds a model or an adapter.
        """
        refuse_model_folder(folder)
        if (Path(folder) / CONFIG_NAME).exists():
            raise ValueError(
                f"{folder} holds an adapter ({CONFIG_NAME}); write the head into a folder of its own, such as "
                f"{Path(folder) / HEAD_FOLDER}."
            )
        tuned = isinstance(self.model, PeftModel)
        file = HeadFile(self.head, self.state, self.classes, self.template, self._probe(), tuned)
        with writing_adapter(folder) as part:
            write_head(part, file, self.model)

    def _probe(self) -> Tensor:
        """Return features (3, d) of a fixed image and of the first two names, by which models are recognized."""
        return torch.cat([self.features([fixed_image()]).cpu(), self.text_features(self.classes[:2])])

    @classmethod
    def _load(
        cls, folder: Path, repo_id: str | Path, base_model: nn.Module | str | None, processor: Any, token: str | None
    ) -> HeadClassifier:
        file, base_name = read_head(folder, repo_id)
        if not isinstance(base_model, nn.Module):
            base_model = load_named_base(file, base_name, base_model, repo_id, token)
        processor = processor or find_processor(base_model, folder, token=token)
        if processor is None:
            raise ValueError(f"No processor beside the head in {repo_id} nor with its base model; pass processor.")
        found = cls(base_model, file.head, file.state, file.classes, processor, file.template)
        file.check_model(found._probe(), repo_id)
        return found


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
