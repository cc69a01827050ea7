"""Sweep over the fraction by which alignment after training turns a classifier: accuracies and the best fraction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from ..geometry.alignment import alignment, rotate_towards_means
from .aligned import SetEncoder
from .sweep import Sweep, check_fractions, check_metric, count_classes, score


def sweep_alignment(
    model: nn.Module,
    dataset: Dataset | Iterable[dict[str, Tensor]],
    validation: Dataset | Iterable[dict[str, Tensor]],
    fractions: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    processing_class: Any = None,
    center: bool = True,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    template: str | None = None,
    metric: str = "balanced_accuracy",
) -> Sweep:
    """Return the results of [`~peft_ncgeo.training.align_classifier`] for each fraction; the model does not change.

    Every image is encoded once.

    Args:
        validation: images to measure accuracies on; not the training images, which the head fits already.
        fractions: numbers from 0 to 1.
        metric: measure that chooses the best fraction: "balanced_accuracy", the mean over classes, or "accuracy",
            which the largest classes of an unbalanced validation set decide.
        model, dataset, processing_class, center, image_column, label_column, batch_size, template: see
            [`~peft_ncgeo.training.align_classifier`].

    Returns:
        A list of one row for each fraction: `fraction`, `accuracy`, `balanced_accuracy`, `cosine` (mean over classes
        of `cos(w_c, mu_c)`). Its `best` is the chosen row; `class_counts` are the numbers of validation images of each
        class.

    Warns: if a class has fewer than 5 validation images.

    Raises:
        ValueError: a fraction is not in 0..1, `metric` is unknown, or as in [`~peft_ncgeo.training.align_classifier`].
    """
    fractions, metric = check_fractions(fractions), check_metric(metric)
    encoder = SetEncoder(model, processing_class, image_column, label_column, batch_size, template)
    trained, judged = encoder.collect(dataset, keep=False), encoder.collect(validation)
    judged.check_names(trained)
    rows, bias = encoder.rows(trained)
    results = []
    for fraction in fractions:
        turned = rotate_towards_means(rows, trained.means, fraction, center=center)
        predicted = encoder.scores(judged.features, turned, bias).argmax(-1)
        results.append(
            {
                "fraction": float(fraction),
                **score(predicted, judged.labels),
                "cosine": float(alignment(turned, trained.means, center).nanmean()),
            }
        )
    return Sweep(results, metric, count_classes(judged.labels, len(judged.means)), judged.names)
