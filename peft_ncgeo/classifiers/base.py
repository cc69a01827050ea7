"""Prediction, the same for all classifiers: names, probabilities, the k best names, and a table for many images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..data.image_batches import ImageBatch, load_batches
from ..data.image_stream import stream_data, stream_images
from ..data.reading import image_name
from ..validation import check_int
from .image_features import check_rows
from .prediction_table import PredictionTable

Views = Sequence[dict[str, Tensor]]  # inputs (B, ...) of each test view of B images


@dataclass(frozen=True)
class Scorer:
    """Names to choose among, and the function that scores them; logits are scores divided by the temperature.

    Attributes:
        names: K names.
        scores: function that returns the scores (B, K) of B images, the mean over their test views.
        temperature: divisor of the scores.
        multi_label: True if an image may have any number of labels, so that each class has a probability of its own.
    """

    names: Sequence[Any]
    scores: Callable[[Views], Tensor]
    temperature: float = 1.0
    multi_label: bool = False

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities (B, K) of scores, in float32."""
        logits = scores / self.temperature
        return (logits.sigmoid() if self.multi_label else logits.softmax(-1)).float()

    def best(self, views: Views, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the k largest scores of each image, (B, k), their indices and probabilities; of ties, the first.

        Args:
            k: at most K.
        """
        scores = self.scores(views)
        values, numbers = (part[:, :k] for part in scores.sort(dim=-1, descending=True, stable=True))
        return values, numbers, self.probabilities(scores).gather(1, numbers)


class Classifier(ABC):
    """Base of all classifiers of images.

    Images are paths, PIL images or uint8 arrays (H, W, 3) or (H, W): one, a list, or a generator. Files are opened
    batch by batch and closed at once.
    """

    @abstractmethod
    def predict(self, images: Any) -> list[Any]:
        """Return the most probable name for each image."""

    @abstractmethod
    def _scorer(self, class_names: Sequence[str] | None) -> Scorer:
        """Return the scorer of these names; None: of the classes that the classifier knows."""

    @abstractmethod
    def _image_processor(self) -> Any:
        """Return the image processor."""

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the most probable name for each image; arguments are those of [`predict`]."""
        return self.predict(images, *args, **kwargs)

    @torch.no_grad()
    def predict_dataset(
        self,
        data: Any,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        top_k: int = 1,
        image_column: str = "image",
        num_test_views: int = 1,
    ) -> pd.DataFrame:
        """Return a table of predictions for any number of images, in their order.

        Images are read batch by batch, and only the best `top_k` probabilities of each are kept, so memory hardly
        grows with the number of images. Predictions are those of `predict` and `predict_proba`.

        Args:
            data: folder, which is searched recursively for image files, sorted by path; a list or generator of paths,
                PIL images or uint8 arrays; or a `datasets.Dataset`, also a streaming one.
            class_names: names to choose among. Default: those that the classifier knows.
            batch_size: images per pass.
            num_workers: processes that open and process images; 0: this process does it.
            top_k: number of most probable names for an image; all K if there are fewer.
            image_column: column of a data set.
            num_test_views: 1, or 5: scores are the mean over five crops, the corners and the centre of an image.

        Returns:
            One row per image: `path` if all images are files, else `row`, the image's number; `label`, the class
            name, for a data set with a label column; `name`, `probability`, then `name_2`, `probability_2` and so on;
            `error`, the reason why an image was not classified (it then has no names), else None.

        Raises:
            FileNotFoundError: the folder does not exist.
            TypeError, ValueError: there are no images, a column is missing, or an argument does not fit.

        Example:

        ```python
        table = classifier.predict_dataset("photos", class_names=["crab", "lobster"], num_workers=4, top_k=2)
        table[table["error"].isna()].to_csv("predictions.csv", index=False)
        ```
        """
        k, stream = check_int("top_k", top_k, least=1), stream_data(data, image_column)
        batches = load_batches(stream, self._image_processor(), batch_size, num_test_views, num_workers)
        scorer = self._scorer(class_names)
        k = min(k, len(scorer.names))
        table = PredictionTable(scorer.names, k, stream.labelled)
        for batch in batches:
            table.add(batch, scorer.best(batch.views, k) if batch.views else None)
        return table.frame()

    def _batches(self, images: Any, batch_size: int, num_test_views: int) -> Iterator[Views]:
        """Check the arguments, and return an iterator of the inputs of each batch.

        Raises:
            TypeError, ValueError: an image cannot be read; the message gives its number and path.
        """
        return _readable(load_batches(stream_images(images), self._image_processor(), batch_size, num_test_views))

    @torch.no_grad()
    def _scores(self, scorer: Scorer, batches: Iterator[Views]) -> Tensor:
        scores = [scorer.scores(views) for views in batches]
        found = torch.cat(scores) if scores else torch.empty(0, len(scorer.names))
        check_rows(found, "logits of image", range(len(found)))  # once: each check waits for the device
        return found

    @torch.no_grad()
    def _best(self, scorer: Scorer, batches: Iterator[Views], k: int) -> tuple[list[list[int]], list[list[float]]]:
        """Return the indices and probabilities, (N, k), of the k best names of each image."""
        found = [scorer.best(views, k) for views in batches]
        if not found:
            return [], []
        values, numbers, probabilities = (torch.cat(part) for part in zip(*found, strict=True))
        check_rows(values, "logits of image", range(len(values)))
        return numbers.tolist(), probabilities.tolist()

    def _predict(self, scorer: Scorer, batches: Iterator[Views]) -> list[Any]:
        return [scorer.names[best] for (best,) in self._best(scorer, batches, 1)[0]]

    def _top_k(self, scorer: Scorer, batches: Iterator[Views], k: int) -> list[list[tuple[Any, float]]]:
        k = min(check_int("k", k, least=1), len(scorer.names))
        rows = zip(*self._best(scorer, batches, k), strict=True)
        return [[(scorer.names[i], p) for i, p in zip(*row, strict=True)] for row in rows]


class ClosedSetClassifier(Classifier):
    """Classifier with known classes; the few-shot heads TipAdapter and GaussianDiscriminant take other names too."""

    def predict(
        self, images: Any, batch_size: int = 64, num_test_views: int = 1, *, class_names: Sequence[str] | None = None
    ) -> list[Any]:
        """Return the most probable class of each image: its name, or its number where names are unknown.

        Args:
            images: paths, PIL images or uint8 arrays (H, W, 3) or (H, W): one, a list, or a generator.
            num_test_views: 1, or 5: scores are the mean over five crops, the corners and the centre of an image.
            class_names: names to choose among, in place of all trained classes; only for a few-shot head other than
                CoPA. New names need TipAdapter or GaussianDiscriminant.

        Raises:
            TypeError, ValueError: an input is not an image or cannot be read (the message gives its number and path),
                scores are not finite, or `class_names` are given to a classifier that does not take them.
        """
        return self._predict(*self._asked(images, batch_size, num_test_views, class_names))

    def predict_proba(
        self, images: Any, batch_size: int = 64, num_test_views: int = 1, *, class_names: Sequence[str] | None = None
    ) -> Tensor:
        """Return class probabilities (N, K), a softmax of the logits, float32 on the CPU; see [`predict`].

        For a model that was trained with [`~peft_ncgeo.losses.MultiLabelLoss`], they are sigmoids of each logit.
        """
        scorer, batches = self._asked(images, batch_size, num_test_views, class_names)
        return scorer.probabilities(self._scores(scorer, batches)).cpu()

    def top_k(
        self,
        images: Any,
        k: int = 5,
        batch_size: int = 64,
        num_test_views: int = 1,
        *,
        class_names: Sequence[str] | None = None,
    ) -> list[list[tuple[Any, float]]]:
        """Return the k most probable classes of each image with their probabilities, the most probable first.

        Args:
            k: number of classes for each image; all K if there are fewer.
            images, batch_size, num_test_views, class_names: see [`predict`].
        """
        return self._top_k(*self._asked(images, batch_size, num_test_views, class_names), k)

    def _asked(
        self, images: Any, batch_size: int, num_test_views: int, class_names: Sequence[str] | None
    ) -> tuple[Scorer, Iterator[Views]]:
        return self._scorer(class_names), self._batches(images, batch_size, num_test_views)


def _readable(batches: Iterator[ImageBatch]) -> Iterator[Views]:
    start = 0
    for batch in batches:
        for i, sample in enumerate(batch.samples, start):
            if sample.error is not None:
                raise type(sample.error)(f"{image_name(i, sample.path)}: {sample.error}") from sample.error
        start += len(batch.samples)
        yield batch.views
