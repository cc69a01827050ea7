"""Base-to-new generalisation of a classifier, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.checks import check_dataset
from ..data.images import LabelledImages
from ..metrics.accuracy import accuracy, harmonic_mean
from ..validation import check_int
from .few_shot import HeadClassifier
from .zero_shot import ZeroShotClassifier


def evaluate_base_new(
    classifier: ZeroShotClassifier | HeadClassifier,
    splits: Mapping[str, Dataset],
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
) -> dict[str, float]:
    """Return the accuracies on base and on new classes, each half among its own names, and their harmonic mean.

    Args:
        classifier: the tuned or untuned model with its processor; or a few-shot classifier whose head takes new names.
        splits: "base" and "new", as `peft_ncgeo.data.base_new_split` returns them; other keys are ignored.
        batch_size: images decoded and classified at once.

    Returns:
        "base", "new" and "harmonic_mean" (`2 b n / (b + n)`), shares in 0..1, as in `GeometryTrainer.evaluate`.

    Raises:
        TypeError, ValueError: `classifier` is not a classifier, a half is missing or not a labelled image set, or an
            image cannot be read.

    Example:

    ```python
    classifier = ZeroShotClassifier.from_pretrained("user/adapter")
    evaluate_base_new(classifier, base_new_split(test_set))
    ```
    """
    if not isinstance(classifier, ZeroShotClassifier | HeadClassifier):
        raise TypeError(
            f"Expected a ZeroShotClassifier(model, processor), or adapt(..., head=TipAdapter()), got "
            f"{type(classifier).__name__}."
        )
    if not isinstance(splits, Mapping):
        raise TypeError(
            f'splits must map "base" and "new" to data sets, got {type(splits).__name__}; see base_new_split.'
        )
    batch_size = check_int("batch_size", batch_size, least=1)
    for half in ("base", "new"):
        if half not in splits:
            raise ValueError(
                f'No half {half!r} among {list(splits)}; base_new_split(test_set) makes "base" and "new".'
            )
        try:
            check_dataset(splits[half], image_column, label_column, every_class=False)
        except (TypeError, ValueError) as error:
            raise type(error)(f"Half {half!r}: {error}") from error
    shares = {
        half: _accuracy(classifier, splits[half], half, image_column, label_column, batch_size)
        for half in ("base", "new")
    }
    return {**shares, "harmonic_mean": harmonic_mean(**shares)}


def _accuracy(
    classifier: ZeroShotClassifier | HeadClassifier,
    dataset: Dataset,
    half: str,
    image_column: str,
    label_column: str,
    batch_size: int,
) -> float:
    names = dataset.features[label_column].names
    samples = LabelledImages(dataset, image_column, label_column)
    starts = range(0, len(samples), batch_size)
    predictions: list[int] = []
    labels: list[int] = []
    for start in tqdm(starts, desc=f"Evaluating {half}", disable=len(starts) < 10):
        batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        # text features are computed once: the classifier keeps them
        images = [sample["image"] for sample in batch]
        probabilities = classifier.predict_proba(images, class_names=names, batch_size=batch_size)
        predictions += probabilities.argmax(dim=-1).tolist()
        labels += [sample["label"] for sample in batch]
    return accuracy(predictions, labels)
