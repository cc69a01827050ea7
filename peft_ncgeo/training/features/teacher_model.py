"""Logits of a teacher that is another model than the trained one, as in distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...data.head_names import check_head_names
from ...data.processors import find_processor, image_processor, makes_same_pixels
from ...geometry.sphere import cosine_logits
from ...models.adapters import unwrap
from ...models.devices import execution_device, is_offloaded
from ...models.feature_extractor import FeatureExtractor, extract_features
from ...models.text_setting import active_text_setting
from ...models.towers import logit_bias, logit_scale, reads_text
from ...validation import short_repr
from ..arguments import GeometryTrainingArguments
from ..task import ClassificationTask
from .text_share import TextShare


class TeacherModel:
    """Logits of another model on the training images, without gradient and in evaluation mode.

    A dual encoder gives `exp(logit_scale) cos(f, g)`. It encodes the class names once for each training, in the
    template of its own adapter, else in that of the arguments; texts of classes are also those of its own adapter,
    else the student's. Rows that its adapter trained for classes take the place of their texts. An image classifier
    must have the same classes in the same order.

    The teacher's weights are not part of the trained model, so they are neither trained nor saved. A checkpoint holds
    a fingerprint of them, and a training does not resume with another teacher.

    Args:
        model: the teacher, with or without adapters; it is moved to the device, unless it is spread over several.
        processing_class: the teacher's processor; None: the one found where the teacher was loaded from.
        student: the classification task of the trained model, with its image processor.
        class_names: class names of the training set.
        args: training arguments.

    Attributes:
        image_processor: the teacher's image processor if it makes other pixels than the student's, else None.

    Raises:
        ValueError: the teacher shares trained parameters with the student, its processor is not known, or it cannot
            classify images into these classes.
    """

    name = "teacher"  # of its fingerprint in checkpoints

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        student: ClassificationTask,
        class_names: Sequence[str],
        args: GeometryTrainingArguments,
    ) -> None:
        name = type(unwrap(model)).__name__
        trained = {id(parameter) for parameter in student.model.parameters() if parameter.requires_grad}
        if any(id(parameter) in trained for parameter in model.parameters()):
            raise ValueError(f"The teacher {name} shares trained parameters with the student; load it a second time.")
        processing_class = find_processor(model) if processing_class is None else processing_class
        if processing_class is None:
            raise ValueError(
                f"No processor is found where the teacher {name} was loaded from; pass teacher_processor, the "
                "student's own if it is the same."
            )
        if not callable(image_processor(processing_class)) or (
            reads_text(model) and not hasattr(processing_class, "tokenizer")
        ):
            raise ValueError(
                f"teacher_processor={short_repr(processing_class)} does not read what the teacher {name} takes; pass "
                "the processor that was saved with it."
            )
        texts = None if not reads_text(model) or active_text_setting(model).class_texts else student.class_texts
        self.task = ClassificationTask(model, processing_class, args, class_texts=texts)
        if self.task.reads_text:
            self.task.texts(class_names)
        else:
            check_head_names(model, class_names, args.label_column)
        processor = self.task.image_processor
        self.image_processor = None if makes_same_pixels(processor, student.image_processor) else processor
        self.class_names = list(class_names)
        dispatched = is_offloaded(model) or getattr(unwrap(model), "hf_device_map", None)
        self.extractor = FeatureExtractor(model if dispatched else model.to(args.device), args.text_batch_size)
        self.forget_texts()

    def forget_texts(self) -> None:
        """Drop the text features, so that the next pass reads the class names again."""
        self._text_features: Tensor | None = None

    def logits(self, **images: Tensor) -> Tensor:
        """Return the logits (B, K) of inputs that the teacher's image processor made."""
        model: Any = self.extractor.model
        device: Any = execution_device(model)
        out = extract_features(self.extractor, **{name: value.to(device) for name, value in images.items()})
        if not self.task.reads_text:
            return out["logits"]
        if self._text_features is None:
            share = TextShare(dict(self.task.texts(self.class_names).to(device)))
            texts = share.gather(extract_features(self.extractor, **share.own)["text_features"])
            self._text_features = active_text_setting(model).put_rows(texts, self.class_names)
        with torch.no_grad():
            return cosine_logits(out["image_features"], self._text_features, logit_scale(model), logit_bias(model))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a fingerprint of the teacher's weights and template, by exact sums: the same on every device."""
        found = hashlib.blake2b(digest_size=8)
        found.update((self.task.template if self.task.reads_text else "").encode())
        if self.task.class_texts:
            found.update(json.dumps(self.task.class_texts, sort_keys=True).encode())
        model: Any = self.extractor.model
        rows = active_text_setting(model).rows
        trained = [] if rows is None else [("rows", rows)]
        for name, value in (*model.named_parameters(), *model.named_buffers(), *trained):
            found.update(f"{name} {value.dtype} {tuple(value.shape)} {_sum_of_bits(value)}".encode())
        return {"fingerprint": torch.tensor(int.from_bytes(found.digest(), "big", signed=True))}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Compare with the fingerprint in a checkpoint.

        Raises:
            ValueError: the fingerprint is that of another teacher.
        """
        if not torch.equal(state_dict["fingerprint"].cpu(), self.state_dict()["fingerprint"]):
            raise ValueError(
                "The checkpoint was written with another teacher, or with the same one in another precision or "
                "template; resume with that teacher, or start from the beginning."
            )


def _sum_of_bits(value: Tensor) -> int:
    if value.is_meta:
        return 0
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = value.detach().view(integers[value.dtype.itemsize]) if value.dtype.itemsize in integers else value.detach()
    return int(whole.sum(dtype=torch.int64))
