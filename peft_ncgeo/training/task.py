"""Class names in the form that a model reads: as texts by tokenizer and template, or as outputs of its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BatchEncoding

from ..data.checks import check_dataset, check_training_set
from ..data.class_prompts import class_prompts
from ..data.class_texts import ClassTexts, list_class_texts
from ..data.head_names import check_head_names, check_same_classes, write_head_names, write_label_kind
from ..data.multi_label import check_multi_label_set
from ..data.processors import image_processor
from ..data.torch_sets import is_torch_set, torch_set_names
from ..models.adapters import unwrap
from ..models.heads import classification_head
from ..models.templates import DEFAULT_TEMPLATE, behind_prompts, placeholder_ids
from ..models.text_setting import TextSetting, active_text_setting, remember_text_setting
from ..models.towers import check_encoders, reads_text
from ..tuners.prompt_config import active_prompt_config
from .arguments import GeometryTrainingArguments
from .label_kinds import check_label_kind


class ClassificationTask:
    """Classification task of a model: a CLIP-like model reads class names as text, a classification model has outputs.

    Args:
        model: plain or under PEFT.
        processing_class: the model's processor; for a classification model its image processor.
        args: arguments with the names of columns, and templates.
        multi_label: True if labels are lists, False if each image has one label.
        class_texts: texts of some classes; None: those that the active adapter was trained with.

    Raises:
        ValueError: the model has neither a text tower nor a head, or the processor cannot read texts.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        args: GeometryTrainingArguments,
        multi_label: bool = False,
        class_texts: ClassTexts | None = None,
    ) -> None:
        if processing_class is None:
            raise ValueError(
                "GeometryTrainer needs processing_class, the model's processor: none is found where the model was "
                "loaded from."
            )
        self.model, self.args, self.multi_label = model, args, multi_label
        self._given_names: Sequence[str] | None = None  # of rows of 0 and 1
        self.tokenizer: Any = getattr(processing_class, "tokenizer", None)
        self.image_processor = image_processor(processing_class)
        self.reads_text = reads_text(model)
        check_encoders(model)
        if self.reads_text and self.tokenizer is None:
            raise ValueError("processing_class has no tokenizer to read class names with; pass the CLIPProcessor.")
        if class_texts and not self.reads_text:
            raise ValueError(
                f"class_texts are given, but {type(unwrap(model)).__name__} reads no text; leave them out."
            )
        known = active_text_setting(model).class_texts if class_texts is None else class_texts
        self.class_texts = list_class_texts(known)

    @property
    def template(self) -> str:
        """Template of the active prompts; without prompts, the arguments', else that of the adapter's training."""
        config = active_prompt_config(self.model)
        if config is None:
            return self.args.template or active_text_setting(self.model).template or DEFAULT_TEMPLATE
        if self.args.template not in (None, config.template):
            raise ValueError(
                f"args.template={self.args.template!r} differs from the adapter's own template={config.template!r}; "
                "set it in the adapter's config only."
            )
        return config.template

    def names(self, dataset: Any, training_names: list[str]) -> list[str]:
        """Check that an evaluation set fits columns, tokenizer and head, and return its class names.

        Args:
            training_names: class names of the training set; empty if nothing is trained.
        """
        columns = self.args.image_column, self.args.label_column
        check_label_kind(dataset, columns[1], self.multi_label, "an evaluation")
        if is_torch_set(dataset):
            names = torch_set_names(dataset, columns[1], None, training_names)
        elif self.multi_label:
            names = check_multi_label_set(dataset, *columns, self._given_names, every_class=False)
        else:
            names = check_dataset(dataset, *columns, every_class=False)
        self._check_names(names, training=training_names != [])
        if training_names and not self.reads_text:
            check_same_classes(names, training_names, self.args.label_column)
        return names

    def training_names(self, dataset: Any, given: Sequence[str] | None, reader: str) -> tuple[list[str], bool]:
        """Check the training set as [`names`] does; return its class names, and True if all images have labels.

        Args:
            given: class names for a set without labels, or with rows of 0 and 1.
            reader: name of the term that reads labels; empty: no term does, so labels may be missing.
        """
        columns = self.args.image_column, self.args.label_column
        check_label_kind(dataset, columns[1], self.multi_label, reader)
        if is_torch_set(dataset):  # labels are checked when they are read
            names, labelled = torch_set_names(dataset, columns[1], given), bool(reader)
        elif self.multi_label:
            names, labelled = check_multi_label_set(dataset, *columns, given), True
            self._given_names = given
        else:
            names, labelled = check_training_set(dataset, *columns, given, reader)
        self._check_names(names, training=True)
        return names, labelled

    def _check_names(self, names: Sequence[str], training: bool) -> None:
        if self.reads_text:
            self.texts(names)
            return
        head: Any = classification_head(self.model)
        learns = training and any(parameter.requires_grad for parameter in head.parameters())
        check_head_names(self.model, names, self.args.label_column, training=learns)

    def write_names(self, names: Sequence[str], logit_bias: float | None = None) -> None:
        """Give the training set's class names to the outputs of a trained head, or else to the active adapters.

        Args:
            logit_bias: see [`~peft_ncgeo.models.text_setting.TextSetting`].
        """
        if not names:
            return
        if not self.reads_text:
            write_head_names(self.model, names)
            write_label_kind(self.model, self.multi_label)
        if isinstance(self.model, PeftModel) and (self.reads_text or self.multi_label):
            known = (self.template, tuple(names)) if self.reads_text else ()
            setting = replace(TextSetting(*known), multi_label=self.multi_label, logit_bias=logit_bias)
            setting = replace(setting, class_texts=self.class_texts)
            remember_text_setting(self.model, setting, self.model.active_adapters)

    def texts(self, names: Sequence[str], templates: Sequence[str] = (), template: str | None = None) -> BatchEncoding:
        """Return the names in the template, with slots for the active adapter's prompts: (K, L).

        A `template` given here replaces the task's. If a class has texts of its own, there are more rows and their
        `counts`, see [`class_prompts`].

        With T `templates`, rows with the names in each of these follow, with the prompts before all words:
        ((1 + T) K, L).
        """
        config, template = active_prompt_config(self.model), template or self.template
        slots = config.num_text_tokens if config else 0
        if config and slots and not config.placeholder_ids:  # the adapter was created without a tokenizer
            config.write_token_ids(config.phrase_ids, placeholder_ids(template, slots, self.tokenizer))
        written = [template, *(behind_prompts(template, slots) for template in templates)]
        texts = [self._read(names, written[0], slots, self.class_texts)]
        texts += [self._read(names, template, slots) for template in written[1:]]
        if len(texts) == 1:
            return texts[0]
        counts = {key: value for key, value in texts[0].items() if key == "counts"}
        if "attention_mask" not in texts[0]:  # all padded to the tower's full length
            return BatchEncoding({"input_ids": torch.cat([text["input_ids"] for text in texts]), **counts})
        rows = [
            row[mask.bool()].tolist()
            for text in texts
            for row, mask in zip(text["input_ids"], text["attention_mask"], strict=True)
        ]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return BatchEncoding({**padded, **counts})

    def frozen_texts(self, names: Sequence[str]) -> list[BatchEncoding]:
        """Return the names in each template that the frozen model reads; none for a classification model.

        Texts of a class replace the task's template, but not templates that only the frozen model reads.
        """
        if not self.reads_text or not names:
            return []
        if self.args.frozen_templates:
            return [self._read(names, template, 0) for template in self.args.frozen_templates]
        return [self._read(names, self.template, 0, self.class_texts)]

    def _read(
        self, names: Sequence[str], template: str, slots: int, class_texts: ClassTexts | None = None
    ) -> BatchEncoding:
        return class_prompts(names, template, slots, self.tokenizer, model=self.model, class_texts=class_texts)
