"""Space alignment after training, without gradients: rotate the classifier's rows towards the class means."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..classifiers.zero_shot import ZeroShotClassifier
from ..data.checks import check_dataset
from ..data.head_names import check_head_names, name_numbers, same_names
from ..data.images import ImageCollator, LabelledImages
from ..data.processors import find_processor, image_processor
from ..geometry.alignment import alignment, rotate_towards_means
from ..geometry.collapse import NeuralCollapse
from ..geometry.sphere import l2_normalize
from ..metrics.accuracy import accuracy
from ..models.adapters import adapter_layers, adapter_parameters, check_adapter_weights, evaluation_mode
from ..models.cosine_head import CosineHead
from ..models.devices import execution_device
from ..models.feature_extractor import FeatureExtractor, extract_features
from ..models.heads import classifier, head_path, linear_classifier, linear_parameter, saved_head
from ..models.image_encoder import image_inputs
from ..models.post_hoc import forget_change, remember_change
from ..models.towers import check_encoders, logit_scale, reads_text
from ..validation import short_repr
from .base import ClosedSetClassifier, Scorer, Views
from .sweep import Sweep, read_fraction


@dataclass
class AlignedClassifier(ClosedSetClassifier):
    """Result of [`align_classifier`]: a classifier with aligned rows, and its accuracy before and after.

    Attributes:
        weight: (K, d), the aligned rows, rounded to the head's precision. For a CLIP-like model they are a separate,
            cached classifier: the model itself computes class texts from words and does not change.
        original: (K, d), the rows before alignment.
        means: (K, d), class means over the data set; nan for classes without samples.
        bias: (K,) or None.
        accuracy_before, accuracy_after: in 0..1, on the validation set, or on the data set if there is none.
        cosine_before, cosine_after: mean over classes of `cos(w_c, mu_c)`.
        class_names: names of the rows, if the data set has them.
        fraction: share of the angle between each row and its mean by which the row was turned.
        basis: text on how a sweep chose the fraction, with the number of validation images per class; else empty.
    """

    weight: Tensor = field(repr=False)
    original: Tensor = field(repr=False)
    means: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    accuracy_before: float
    accuracy_after: float
    cosine_before: float
    cosine_after: float
    class_names: list[str] | None
    _encoder: SetEncoder = field(repr=False)
    _parameter: nn.Parameter | None = field(default=None, repr=False)
    _before: Tensor | None = field(default=None, repr=False)
    fraction: float = 0.0
    basis: str = ""
    _adapter: str | None = field(default=None, repr=False)  # that holds the head

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the rows of the model's head. A CLIP-like model was never changed."""
        if self._parameter is not None and self._before is not None:
            self._parameter.copy_(self._before)
        if self._adapter is not None:
            forget_change(self._encoder.model, self._adapter, self._change)

    @property
    def _change(self) -> str:
        return f"the head was turned by {self.fraction:g} of the angle to the class means" + (
            f", {self.basis}" if self.basis else ""
        )

    @property
    def model(self) -> nn.Module:
        """Model whose classifier was aligned."""
        return self._encoder.model

    def rows_of(self, class_names: Sequence[str]) -> Tensor:
        """Return the aligned rows of these classes.

        Raises:
            ValueError: there are fewer than two names, or a name has no row.
        """
        return self.weight[name_numbers(class_names, self.class_names or [])]

    def _scorer(self, class_names: Sequence[str] | None) -> Scorer:
        if class_names is not None:
            raise ValueError("Aligned rows exist for the data set's classes alone; leave out class_names.")
        names = range(len(self.weight)) if self.class_names is None else self.class_names
        return Scorer(names, self._scores_of, self._encoder.temperature())

    def _scores_of(self, views: Views) -> Tensor:
        """Return scores (B, K) in float64, where they are finite even with the largest scale of cosines."""
        features = [self._encoder.encode(view).cpu() for view in views]
        return torch.stack([self._encoder.scores(part, self.weight, self.bias) for part in features]).mean(0).double()

    def _image_processor(self) -> Any:
        return self._encoder.image_processor()


def align_classifier(
    model: nn.Module,
    dataset: Dataset | Iterable[dict[str, Tensor]],
    fraction: float | Sweep,
    processing_class: Any = None,
    validation: Dataset | Iterable[dict[str, Tensor]] | None = None,
    center: bool = True,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    template: str | None = None,
) -> AlignedClassifier:
    r"""Rotate each row of a trained classifier towards its class mean by a fraction of their angle; keep its length.

    This is our variant of space alignment, without training. `mu_c` is the mean feature of class c over `dataset`,
    minus the mean of these over the classes. Rows of classes without samples, and rows that are 0 or parallel to
    their mean, do not change.

    The head of an image classifier is changed in place; [`AlignedClassifier.undo`] restores it. The head may be
    trained through `modules_to_save`, adapted by LoRA, or belong to the base model. Only the first is saved in the
    adapter's file; otherwise the base model's weights change, and a warning says so. For a CLIP-like model the rows
    are the texts of the data set's class names; the model does not change, and the result is a separate classifier.

    Args:
        model: plain or under PEFT.
        dataset: labelled training images, or batches with `pixel_values` (B, C, H, W), `labels` (B,) and the other
            tensors that the model's image processor returns.
        fraction: 0 (no change) to 1 (weights parallel to the means), or the result of
            [`~peft_ncgeo.training.sweep_alignment`], which chooses it.
        processing_class: the model's (image) processor. Default: loaded from the base model's name or path.
        validation: images to measure accuracy on. Default: `dataset`; its features, (N, d) float32, are then kept.
        center: False uses class means without subtracting their mean.
        image_column, label_column: columns of the data sets.
        batch_size: images per pass.
        template: text around a class name, for a CLIP-like model. Default: the adapter's own, else
            "a photo of a {}.".

    Raises:
        ValueError: the fraction is out of range, the head is not linear, no processor is found, or the data do not
            fit: for instance, the names of the labels differ from those of the head's outputs in `model.config`.

    Example:

    ```python
    sweep = sweep_alignment(model, train, validation, processing_class=processor)
    aligned = align_classifier(model, train, sweep, processor, validation)
    print(aligned)  # accuracy before and after, and how the fraction was chosen
    aligned.undo()
    ```
    """
    fraction, basis = read_fraction(fraction)
    encoder = SetEncoder(model, processing_class, image_column, label_column, batch_size, template)
    trained = encoder.collect(dataset, keep=validation is None)
    judged = trained if validation is None else encoder.collect(validation)
    judged.check_names(trained)
    original, bias = encoder.rows(trained)
    aligned = rotate_towards_means(original, trained.means, fraction, center=center).to(original)
    parameter, held = None if reads_text(model) else linear_parameter(model), False
    kept = None if parameter is None else parameter.detach().clone()
    try:
        if parameter is not None:
            aligned = _turn(parameter, aligned - original, encoder, trained)
            held = any(p is parameter for p in adapter_parameters(model))
            if adapter_layers(model) and not held:
                warnings.warn(
                    "The head belongs to the base model, so the adapter's file will not hold its aligned weights; "
                    f"train it with {saved_head(model)}, or save the whole model.",
                    stacklevel=2,
                )
        before, after = (judged.accuracy(encoder, rows, bias) for rows in (original, aligned))
        result = AlignedClassifier(
            weight=aligned,
            original=original,
            means=trained.means,
            bias=bias,
            accuracy_before=before,
            accuracy_after=after,
            cosine_before=float(alignment(original, trained.means, center).nanmean()),
            cosine_after=float(alignment(aligned, trained.means, center).nanmean()),
            class_names=trained.names,
            fraction=fraction,
            basis=basis,
            _encoder=encoder,
            _parameter=parameter,
            _before=kept,
            _adapter=model.active_adapter if held and isinstance(model, PeftModel) else None,
        )
    except BaseException:  # also Ctrl-C: without a result the caller cannot undo it
        if parameter is not None and kept is not None:
            with torch.no_grad():
                parameter.copy_(kept)
        raise
    if result._adapter is not None:
        remember_change(model, result._adapter, result._change)
    return result


@torch.no_grad()
def _turn(parameter: nn.Parameter, change: Tensor, encoder: SetEncoder, trained: _Collected) -> Tensor:
    """Add a change to the head's rows, and return the new rows, rounded if the head is in half precision.

    Raises:
        ValueError: an adapter of the head does more than add to its weights.
    """
    kept, (original, _) = parameter.detach().clone(), encoder.rows(trained)
    wide = torch.promote_types(parameter.dtype, torch.float32)
    parameter.copy_(kept.to(wide) + change.to(parameter.device, wide))
    reached, _ = encoder.rows(trained)
    precision = max(1e-3, torch.finfo(parameter.dtype).eps)
    largest = max(float(rows.abs().max()) for rows in (original, reached, kept))
    if not torch.allclose(reached, original + change, atol=precision * largest):
        raise ValueError(
            "The head's adapter does more than add to its weights, as DoRA and IA3 do, so they cannot be rotated; "
            f"train the head with {saved_head(encoder.model)}."
        )
    return reached


@dataclass
class _Collected:
    means: Tensor  # (K, d) float64
    names: list[str] | None
    features: Tensor  # (N, d), empty unless kept
    labels: Tensor

    def check_names(self, trained: _Collected) -> None:
        if self.names and trained.names and not same_names(self.names, trained.names):
            raise ValueError(
                f"The validation set's classes {short_repr(self.names)} are not the data set's "
                f"{short_repr(trained.names)} in the same order; give both the same ClassLabel, for instance with "
                "align_labels_with_mapping."
            )

    def accuracy(self, encoder: SetEncoder, rows: Tensor, bias: Tensor | None) -> float:
        return accuracy(encoder.scores(self.features, rows, bias).argmax(-1), self.labels)


class SetEncoder:
    """Encoder of images as features, and of features as class scores in the order of the model's logits."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        image_column: str,
        label_column: str,
        batch_size: int,
        template: str | None,
    ) -> None:
        self.model, self.processor, self.template = model, processor, template
        self.image_column, self.label_column, self.batch_size = image_column, label_column, batch_size
        self.extractor = FeatureExtractor(model)
        check_adapter_weights(model)
        self.reads_text = reads_text(model)
        check_encoders(model)
        self.device = execution_device(model)

    def collect(self, dataset: Any, keep: bool = True) -> _Collected:
        """Compute class means batch by batch, and keep the features if asked."""
        names = None
        if isinstance(dataset, Dataset):
            names = check_dataset(dataset, self.image_column, self.label_column, False)
            if not self.reads_text:
                check_head_names(self.model, names, self.label_column)
        elif self.reads_text:
            raise ValueError("Class texts need names; pass a datasets.Dataset with a ClassLabel column.")
        features, labels, collapse = [], [], None
        for batch in self._batches(dataset):
            own = self.encode(batch)
            if collapse is None:
                classes = len(names) if names else linear_parameter(self.model).shape[0]
                collapse = NeuralCollapse(classes, own.shape[1], keep_samples=False)
            collapse.update(own, batch["labels"])
            if keep:
                features.append(own.cpu())
                labels.append(batch["labels"].cpu())
        if collapse is None:
            raise ValueError("There are no images for class means; pass at least one batch.")
        kept = [torch.cat(part) if part else torch.empty(0) for part in (features, labels)]
        return _Collected(collapse.class_means.cpu(), names, *kept)

    def rows(self, collected: _Collected) -> tuple[Tensor, Tensor | None]:
        """Return the classifier's rows (K, d) and bias: class texts, or the head's response to unit vectors."""
        if self.reads_text:
            assert collected.names is not None  # collect checks it
            with evaluation_mode(self.model):
                zero_shot = ZeroShotClassifier(self.model, self._processor(), self.template)
                return zero_shot.text_features(collected.names).float().cpu(), None
        parameter, head = linear_parameter(self.model), linear_classifier(self.model)  # refuses what is not linear
        if parameter.is_meta:
            path = head_path(self.model)
            raise ValueError(f'The head is offloaded; keep it on a device: device_map={{..., "{path}": "cpu"}}.')
        if head is not None:
            rows, bias = head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
        else:  # LoRA: the response to unit vectors, in a copy that does not round
            wide = torch.promote_types(parameter.dtype, torch.float32)
            head = copy.deepcopy(classifier(self.model)).to(wide).eval()
            with torch.no_grad():
                bias = head(parameter.new_zeros(1, parameter.shape[1], dtype=wide))[0]
                rows = (head(torch.eye(parameter.shape[1]).to(parameter.device, wide)) - bias).T
        if len(rows) != len(collected.means):
            raise ValueError(
                f"The head has {len(rows)} outputs, the data set {len(collected.means)} classes; they must be equal."
            )
        return rows.float().cpu(), None if bias is None else bias.float().cpu()

    def scores(self, features: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        if self.reads_text or isinstance(classifier(self.model), CosineHead):
            # the same order as the logits at any temperature
            return l2_normalize(features) @ l2_normalize(rows.to(features)).T
        return nn.functional.linear(features, rows.to(features), None if bias is None else bias.to(features))

    def temperature(self) -> float:
        """Return the divisor that turns scores into logits: the inverse of the scale of cosines."""
        if self.reads_text:
            return logit_scale(self.model).double().exp().reciprocal().item()
        head = classifier(self.model)
        return 1 / head.scale if isinstance(head, CosineHead) else 1.0

    def encode(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the features (B, d) of an image tower's inputs."""
        return extract_features(self.extractor, **image_inputs(inputs, self.device))["image_features"].float()

    def _batches(self, dataset: Any) -> Iterator[dict[str, Tensor]]:
        if isinstance(dataset, Dataset):
            images = LabelledImages(dataset, self.image_column, self.label_column)
            collator = ImageCollator(self.image_processor())
            dataset = DataLoader(images, self.batch_size, collate_fn=collator)
        total = len(dataset) if hasattr(dataset, "__len__") else None
        for batch in tqdm(dataset, desc="Encoding", total=total, disable=total is not None and total < 10):
            if not {"pixel_values", "labels"} <= set(batch):
                raise ValueError(f"A batch must hold pixel_values and labels, but it has {sorted(batch)}.")
            yield batch

    def _processor(self) -> Any:
        if self.processor is None:
            self.processor = find_processor(self.model)
            if self.processor is None:
                raise ValueError("No processor is found with the base model; pass processing_class.")
        return self.processor

    def image_processor(self) -> Any:
        """Return the model's image processor."""
        return image_processor(self._processor())
