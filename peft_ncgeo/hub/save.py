"""Writing of an adapter's folder for other people: adapter, processor, card and figure."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn

from ..classifiers.few_shot import FewShotClassifier, HeadClassifier
from ..data.head_names import CLASS_NAMES, count_outputs, head_names, write_class_names
from ..data.processors import find_processor
from ..files import file_name, writing
from ..loading.adapter_folder import refuse_model_folder, writing_adapter
from ..loading.load import HEAD, PROCESSOR_FILES, PROTOTYPES
from ..loading.text_setting_file import TEXT_FILES, write_text_setting
from ..models.base_model import base_name, is_folder
from ..models.text_setting import adapter_text_setting
from .card import FIGURE, create_card
from .few_shot_record import record_few_shot
from .record import TrainingRecord, check_peft_model, record_model

# files that an adapter of another kind may have left
OPTIONAL = (CLASS_NAMES, PROTOTYPES, HEAD, *TEXT_FILES, FIGURE, *PROCESSOR_FILES)


def save_adapter(
    model: nn.Module | FewShotClassifier,
    folder: str | Path,
    processor: Any = None,
    base_model_id: str | None = None,
    record: TrainingRecord | None = None,
    **card: Any,
) -> None:
    """Write the folder that [`push_adapter`] pushes: adapter, processor, card and figure.

    If the base model was loaded from a folder, the adapter does not name it: pass `base_model_id` here, or pass the
    base model when you load the adapter.

    Args:
        model: a `PeftModel`, or a [`~peft_ncgeo.FewShotClassifier`] around one or with a head on cached features.
        folder: folder to write. Files of an earlier adapter are replaced; other files stay. If writing is interrupted,
            it holds the earlier adapter, or nothing that can be loaded, but never a mixture of two adapters.
        processor, base_model_id, record, card: see [`push_adapter`].

    Warns: if no processor is found to save.

    Raises:
        TypeError: the model is of another kind.
        ValueError: the adapter's name cannot be a folder name, the folder holds a model, or a head was fitted on a
            tuned model.
        OSError: the folder cannot be written.
    """
    published, folder = published_model(model), Path(folder)
    if isinstance(model, HeadClassifier):
        _save_head(model, folder, processor, base_model_id, record, card)
        return
    tuned = check_peft_model(published)
    name: Any = model.adapter_name if isinstance(model, FewShotClassifier) else tuned.active_adapter
    file_name(name or "default", "an adapter")  # PEFT names a folder after it
    refuse_model_folder(folder)
    base = base_name(tuned)
    base_model_id = base_model_id or base
    base_model_id = None if is_folder(base_model_id) else base_model_id or None
    with writing(folder), writing_adapter(folder, OPTIONAL) as part:
        if isinstance(model, FewShotClassifier):
            model.save_pretrained(part)
            record = record or record_few_shot(model)
            processor = processor or model.processor
        else:
            tuned.save_pretrained(str(part), selected_adapters=[name])
            record = record or record_model(model)
        if name != "default":  # PEFT writes it into a folder of its own
            for file in (part / name).iterdir():
                file.replace(part / file.name)
            (part / name).rmdir()
        _write_config(part / CONFIG_NAME, base_model_id, other_base=not is_folder(base) and base_model_id != base)
        if record.kind == "text":
            known = adapter_text_setting(tuned, name)
            names = known.class_names or tuple(record.class_names)
            write_text_setting(part, replace(known, template=known.template or record.template, class_names=names))
        if record.kind == "head":
            generic = [f"LABEL_{i}" for i in range(count_outputs(tuned))]
            write_class_names(part, record.class_names or head_names(tuned) or generic)
            if record.multi_label:
                write_text_setting(part, replace(adapter_text_setting(tuned, name), template=None))
        processor = processor or find_processor(tuned) or find_processor(tuned, base_model_id)
        if processor is None:
            warnings.warn("No processor was found to save beside the adapter; pass processor.", stacklevel=2)
        else:
            processor.save_pretrained(str(part))
            # timm's processor has no file: it is part of the base model's config
            if not any((part / file).exists() for file in PROCESSOR_FILES):
                card.setdefault("processor_id", base_model_id)
        card.setdefault("figure", draw_geometry(record, part))
        create_card(model, record, base_model_id=base_model_id, **card).save(part / "README.md")


def draw_geometry(record: TrainingRecord, folder: str | Path) -> str | None:
    """Draw class means and classifier before and after; return the file's name, or None without matplotlib or data."""
    if record.snapshots is None:
        return None
    try:
        from ..plots.alignment import plot_alignment  # matplotlib is an extra
    except ImportError:
        return None
    plot_alignment(*record.snapshots, Path(folder) / FIGURE, record.class_names)
    return FIGURE


def _save_head(
    model: HeadClassifier,
    folder: Path,
    processor: Any,
    base_model_id: str | None,
    record: TrainingRecord | None,
    card: dict[str, Any],
) -> None:
    """Write head, processor and card; see [`save_adapter`]."""
    with writing(folder):
        model.save_pretrained(folder)
        (processor or model.processor).save_pretrained(str(folder))
        base_model_id = None if is_folder(base_model_id) else base_model_id
        create_card(model, record, base_model_id=base_model_id, **card).save(folder / "README.md")


def published_model(model: Any) -> nn.Module:
    """Return the model whose adapter or head is written: a `PeftModel`, or the plain model under a head.

    Raises:
        TypeError: there is no `PeftModel`.
        ValueError: a head was fitted on a tuned model, so other people could not load both from one folder.
    """
    if isinstance(model, HeadClassifier):
        if isinstance(model.model, PeftModel):
            raise ValueError(
                "The head was fitted on a tuned model; save its adapter with save_adapter(classifier.model, ...) and "
                "the head beside it with classifier.save_pretrained, each into a folder of its own."
            )
        return model.model
    return check_peft_model(model.model if isinstance(model, FewShotClassifier) else model)


def _write_config(file: Path, base_model_id: str | None, other_base: bool) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model_id
    if other_base:
        config["revision"] = None  # it belongs to the repository that the model was loaded from
    if is_folder(config.get("tokenizer_name_or_path")):
        config["tokenizer_name_or_path"] = None  # the base model has it; the config holds the tokens anyway
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
