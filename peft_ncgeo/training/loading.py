"""Batches of images: augmented views and balanced classes for training, crops for evaluation."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..data.crops import five_crops
from ..data.images import crop_flip
from ..data.processors import input_size
from ..data.sampling import label_array
from ..data.torch_sets import is_stream, labelled_images
from ..models.feature_extractor import trained_batch_norms
from .evaluating import EvaluatingTrainer
from .sampling import ClassBalancedSampler, check_batches, count_samples_once, drop_last_only


class LoadingTrainer(EvaluatingTrainer):
    """Transformers' Trainer whose data loaders read images as the arguments say."""

    class_names: list[str]
    labelled: bool

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        augment, is_training = None, kwargs.get("is_training", False)
        if is_training and self.args.augmentation == "crop_flip":
            augment = partial(crop_flip, size=input_size(self.task.image_processor))
        columns = self.args.image_column, self.args.label_column if self.labelled or not is_training else None
        crop = None
        if not is_training and self.args.num_test_views > 1:
            crop = partial(five_crops, size=input_size(self.task.image_processor))
        images = labelled_images(
            dataset, *columns, self.class_names, is_training, augment, self.args.seed, self.args.num_views, crop
        )
        if is_stream(images):  # every process reads its own images
            self.accelerator.dataloader_config.dispatch_batches = False
        with drop_last_only(self.args, is_training):
            loader = super()._get_dataloader(images, *args, **kwargs)
        if is_training and not is_stream(images):
            count_samples_once(loader)
            least = 2 if trained_batch_norms(self.extractor) else 1
            drop_last = self.args.dataloader_drop_last
            check_batches(loader, self._train_batch_size, self.args.world_size, least, drop_last)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.args.class_balanced_sampling:
            return super()._get_train_sampler(train_dataset)
        return ClassBalancedSampler(label_array(self.train_dataset, self.args.label_column), self.args.seed)
