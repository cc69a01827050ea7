"""Heads of recipes: fitted on the training images of a run, then used to classify its test sets."""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from ..classifiers.few_shot import HeadClassifier
from ..classifiers.heads import FeatureHead
from ..data.checks import class_names
from ..data.images import LabelledImages
from ..few_shot.adapt import adapt
from ..training import GeometryTrainer


class FittedHead:
    """Head fitted on the trainer's training images, with the features of its model in its present state.

    Args:
        head: the method.
        trainer: trainer of a dual encoder, before or after training; the head uses its seed.

    Raises:
        ValueError: see [`~peft_ncgeo.adapt`].
    """

    def __init__(self, head: FeatureHead, trainer: GeometryTrainer) -> None:
        self._args = trainer.args
        images = LabelledImages(trainer.train_dataset, self._args.image_column, self._args.label_column)
        samples = [images[i] for i in range(len(images))]
        classifier = adapt(
            trainer.extractor.model,
            [sample["image"] for sample in samples],
            [sample["label"] for sample in samples],
            class_names=trainer.class_names,
            head=head,
            processor=trainer.processing_class,
            batch_size=self._args.per_device_eval_batch_size,
            template=trainer.task.template,
            seed=self._args.seed,
        )
        assert isinstance(classifier, HeadClassifier)  # CoPA is no head of a recipe
        self.classifier = classifier

    def knows(self, dataset: Dataset) -> bool:
        """Return True if the head was fitted on all class names of a test set, or takes new names."""
        return self.classifier.knows(class_names(dataset, self._args.label_column))

    def predict(self, dataset: Dataset, by_texts: np.ndarray | None = None) -> np.ndarray | None:
        """Return the predicted classes (N,) of a test set, over its own class names.

        The head predicts them if it was fitted on all names of the set or takes new names. Otherwise they are
        `by_texts`, or None for a head that reads no texts.

        Args:
            dataset: labelled images.
            by_texts: (N,), classes that the model's own texts predict. Not read where the head knows all names.
        """
        names = class_names(dataset, self._args.label_column)
        if not self.knows(dataset):
            return by_texts if self.classifier.head.reads_texts else None
        samples = LabelledImages(dataset, self._args.image_column, None)
        images = (samples[i]["image"] for i in range(len(samples)))
        size, views = self._args.per_device_eval_batch_size, self._args.num_test_views
        predicted = self.classifier.predict(images, size, views, class_names=names)
        places = {name: i for i, name in enumerate(names)}
        return np.array([places[name] for name in predicted])
