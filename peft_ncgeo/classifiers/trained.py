"""Classifier of images by the classes that an image classification model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification

from ..data.head_names import count_outputs, head_names, is_multi_label
from ..data.processors import find_processor, image_processor
from ..loading.hub_errors import hub_errors
from ..loading.load import fetch_files, load_adapter, refuse_unsaved
from ..models.adapters import check_adapter_weights, evaluation_mode, unwrap
from ..models.devices import execution_device, one_at_a_time
from ..models.heads import classifier
from ..models.image_encoder import image_inputs
from ..models.snapshots import unchanged_on_error
from ..models.towers import reads_text
from ..validation import short_repr
from .base import ClosedSetClassifier, Scorer, Views
from .best_names import check_threshold, names_above
from .exported_classifier import ExportedClassifier
from .image_classifier import ImageClassifier  # noqa: F401  tells the auto class of it


class TrainedClassifier(ClosedSetClassifier):
    """Classifier of images by the classes of a model's own head: a tuned or untuned image classification model.

    Args:
        model: a `...ForImageClassification` model, an [`~peft_ncgeo.ImageClassifier`], an exported classifier, or a
            `PeftModel` around one.
        processor: its image processor, or a processor that holds one. Default: loaded from the base model's name or
            path.

    Raises:
        ValueError: the model has no classification head, or no processor is found.

    Example:

    ```python
    classifier = TrainedClassifier.from_pretrained("pandas")  # an adapter, an export, or a whole model
    classifier.predict("photo.jpg")
    classifier.predict_dataset("photos", num_workers=4)
    ```
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        name = type(unwrap(model)).__name__
        if reads_text(model):
            raise ValueError(f"{name} reads class names, so it has no classes of its own; use ZeroShotClassifier.")
        if classifier(model) is None and not isinstance(unwrap(model), ExportedClassifier):
            raise ValueError(f"{name} has no classification head; pass a ...ForImageClassification model.")
        check_adapter_weights(model)
        processor = processor or find_processor(model, images_only=True)
        if processor is None:
            raise ValueError("No image processor is found with the base model; pass processor.")
        self.model, self.processor = model, processor

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | Path,
        base_model: nn.Module | str | None = None,
        processor: Any = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> TrainedClassifier:
        """Load an adapter, an exported classifier or a whole model, from a folder or a repository of the Hub.

        Args:
            base_model: base model of an adapter, see [`~peft_ncgeo.hub.load_adapter`].
            processor: the image processor. Default: the one beside the files, else the base model's.
            revision, token: for the Hub.

        Raises:
            OSError, ValueError: as in [`~peft_ncgeo.hub.load_adapter`]; or the files hold no trained head.
        """
        folder = fetch_files(repo_id, revision, token)
        refuse_unsaved(folder, repo_id)
        with unchanged_on_error(base_model):
            if (folder / CONFIG_NAME).is_file():
                model: nn.Module = load_adapter(folder, base_model, token=token)
            else:
                model = _load_model(repo_id, base_model, revision, token)
            return cls(model, processor or find_processor(model, folder, images_only=True, token=token))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the model's outputs; empty if they are not known."""
        return head_names(self.model)

    def _scorer(self, class_names: Sequence[str] | None) -> Scorer:
        if class_names is not None:
            raise ValueError("The model's head has only the classes of its training; leave out class_names.")
        names = self.class_names or range(count_outputs(self.model))
        return Scorer(names, self._logits, multi_label=is_multi_label(self.model))

    def predict_labels(
        self, images: Any, batch_size: int = 64, num_test_views: int = 1, threshold: float = 0.5
    ) -> list[list[Any]]:
        """Return the names of all classes in each image, none to K, the most probable first.

        Args:
            threshold: smallest probability of [`predict_proba`] at which a class counts as present.

        Raises:
            ValueError: the model was trained on images with one label each.
        """
        threshold = check_threshold(threshold)
        if not is_multi_label(self.model):
            raise ValueError("The model was trained on images with one label each; use predict or top_k.")
        scorer, batches = self._asked(images, batch_size, num_test_views, None)
        return names_above(scorer.probabilities(self._scores(scorer, batches)), scorer.names, threshold)

    def _logits(self, views: Views) -> Tensor:
        """Return the logits (B, K), in float32 or wider, the mean over the views."""
        dtype, device = next(self.model.parameters()).dtype, execution_device(self.model)
        found = []
        with evaluation_mode(self.model), one_at_a_time(self.model):
            for view in views:
                inputs = image_inputs(view, device)
                logits = self.model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}).logits
                found.append(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return torch.stack(found).mean(0)

    def _image_processor(self) -> Any:
        return image_processor(self.processor)


def _load_model(repo_id: str | Path, base_model: Any, revision: str | None, token: str | None) -> nn.Module:
    """Return a whole model with its head.

    Raises:
        OSError, ValueError: there is no such model, or its files lack weights.
    """
    if base_model is not None:
        raise ValueError(f"{repo_id} holds no adapter ({CONFIG_NAME}); leave out base_model, or name an adapter.")
    options: dict[str, Any] = {"revision": revision or "main", "token": token, "trust_remote_code": False}
    with hub_errors(f"The model {repo_id} cannot be loaded"):
        config = AutoConfig.from_pretrained(repo_id, **options)
        is_export = ExportedClassifier.__name__ in (config.architectures or ())
        kind: Any = ExportedClassifier if is_export else AutoModelForImageClassification
        model, told = kind.from_pretrained(repo_id, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{repo_id} lacks {short_repr(missing[0])}, so its classes would be random; name a trained classifier."
        )
    return model.eval()
