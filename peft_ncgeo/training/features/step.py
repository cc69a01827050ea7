"""Features that the losses of a training step read, each computed as rarely as possible."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from ...data.images import TEACHER, ImageCollator, LabelledImages, counted_rows
from ...models.batch_norm import rows_that_count
from ...models.feature_extractor import FeatureExtractor, extract_features
from ...models.image_encoder import image_inputs
from ...models.towers import reads_text
from ..arguments import GeometryTrainingArguments
from .teacher import FrozenTeacher
from .teacher_model import TeacherModel
from .text_share import TextShare
from .views import ViewFeatures, never_changes


class StepFeatures:
    """Features of micro-batches: the student's, and the frozen model's and a teacher's if a loss asks for them.

    - Texts do not depend on images: one pass of the text tower serves all micro-batches of an optimiser step, and each
      process encodes its share of the texts.
    - The frozen model and the teacher encode their texts once.
    - If images have fixed views, the frozen model and the teacher encode each view once. The student does so too if
      nothing in its image tower is trained; then images are not even decoded.

    Args:
        extractor: the student.
        frozen: the frozen model, or None.
        teacher: another model, or None.
        required: [`GeometryBatch`] fields that losses ask for.
        args: training arguments.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        frozen: FrozenTeacher | None,
        teacher: TeacherModel | None,
        required: Collection[str],
        args: GeometryTrainingArguments,
    ) -> None:
        self.extractor, self.frozen, self.teacher, self.args = extractor, frozen, teacher, args
        self.required = set(required) if frozen is not None else set()
        self.begin({})

    def begin(self, texts: dict[str, Tensor]) -> None:
        """Start a training on these texts; drop the features of images and of an unfinished step."""
        self.texts = TextShare(texts)
        self.forget_step()
        self.student_views: ViewFeatures | None = None
        self.frozen_views: ViewFeatures | None = None
        self.teacher_views: ViewFeatures | None = None
        if self.teacher is not None:
            self.teacher.forget_texts()

    def forget_step(self) -> None:
        """Drop the texts' features, so that the next micro-batch encodes them again."""
        self.step_text: Tensor | None = None

    end_step = forget_step

    def student(self, model: nn.Module, inputs: dict[str, Any], is_last: bool) -> dict[str, Tensor]:
        """Return `image_features` (B, d) and `text_features` (K, d), or `logits` (B, K), with gradient.

        Args:
            model: the extractor, wrapped by DDP if there are several processes.
            inputs: `pixel_values` (B, C, H, W) and the other tensors that the model needs, or `views` if the images'
                features are known.
            is_last: True if an optimiser step follows this micro-batch.
        """
        new = {} if self.step_text is not None else dict(self.texts.own)
        if "pixel_values" in inputs:
            new |= image_inputs(inputs)
        with rows_that_count(counted_rows(inputs["labels"])):
            out: dict[str, Tensor] = model(**new) if new else {}
        if "text_features" in out:
            out["text_features"] = self.texts.gather(out["text_features"])
        if self.student_views is not None:
            out["image_features"] = self.student_views.of(inputs["views"], inputs["labels"].device)
        if self.step_text is not None:
            out["text_features"] = self.step_text
        # DDP reduces in a backward pass only what a forward pass announced
        announced = "pixel_values" in new or self.args.world_size == 1
        kept = announced and self.args.gradient_accumulation_steps > 1 and not is_last
        self.step_text = out.get("text_features") if kept else None
        return out

    def frozen_images(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return `frozen_image_features` (B, d), or nothing if no loss asks for them."""
        if self.frozen is None or "frozen_image_features" not in self.required:
            return {}
        if self.frozen_views is not None:
            features = self.frozen_views.of(inputs["views"], inputs["labels"].device)
        else:
            features = self.frozen.image_features(**image_inputs(inputs))
        return {"frozen_image_features": features}

    def frozen_texts(self, device: Any) -> dict[str, Tensor]:
        """Return `frozen_text_features` (K, d), or nothing if no loss asks for them."""
        if self.frozen is None or "frozen_text_features" not in self.required:
            return {}
        return {"frozen_text_features": self.frozen.text_features(device)}

    def teacher_logits(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return `teacher_logits` (B, K), or nothing without a teacher."""
        if self.teacher is None:
            return {}
        device = inputs["labels"].device
        if self.teacher_views is not None:
            return {"teacher_logits": self.teacher_views.of(inputs["views"], device)}
        prefix = "" if self.teacher.image_processor is None else TEACHER
        return {"teacher_logits": self.teacher.logits(**image_inputs(inputs, prefix=prefix)).to(device)}

    def look_ahead(self, images: Any, collate: Callable[..., dict[str, Any]], steps: int) -> None:
        """Encode every view now if `steps` optimiser steps will use each view more than once on average."""
        args = self.args
        seen = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if not isinstance(images, LabelledImages) or not images.views or seen < 2 * images.views:
            return

        def embed(encoder: Callable[..., Tensor], collate: Callable[..., dict[str, Any]] = collate) -> ViewFeatures:
            sizes = args.eval_batch_size, args.dataloader_num_workers
            return ViewFeatures(images, collate, encoder, args.device, *sizes, quiet=bool(args.disable_tqdm))

        sample = collate([images.fixed_view(0)])
        if "views" not in sample:
            return  # a collator of the user's own, which does not say which views it holds
        images.show_teacher(False)  # its pixels are made once, below
        one = image_inputs(sample, args.device)
        if reads_text(self.extractor.model) and never_changes(self.extractor, self.extractor(**one)):
            self.student_views = embed(lambda **images: extract_features(self.extractor, **images)["image_features"])
        if self.frozen is not None and "frozen_image_features" in self.required:
            self.frozen_views = embed(self.frozen.image_features)
        if self.teacher is not None:
            own = self.teacher.image_processor
            self.teacher_views = embed(self.teacher.logits, collate if own is None else ImageCollator(own))
        images.show(self.student_views is None)
