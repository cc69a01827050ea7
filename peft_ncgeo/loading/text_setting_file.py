"""Files beside an adapter: template, class names and kind of labels in its training, and rows for these classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.class_prompts import list_names
from ..data.class_texts import list_class_texts
from ..files import read_json
from ..models.templates import check_template
from ..models.tensor_files import check_tensors, read_shapes
from ..models.text_setting import TextSetting
from ..validation import check_bool, check_float, one_line, short_repr
from .adapter_folder import weights_digest

TEXT_SETTING, CLASS_ROWS = "geometry.json", "class_rows.safetensors"
TEXT_FILES = (TEXT_SETTING, CLASS_ROWS)
_KEYS = {"template", "class_names", "multi_label", "logit_bias", "class_texts"}
_LARGEST = 2**24  # bytes; a hundred thousand names
_ADAPTER = "adapter_sha256"  # key in the rows' header: digest of the adapter that they belong to


def write_text_setting(folder: Path, setting: TextSetting) -> None:
    """Write the known settings of the adapter in this folder; write no file if none are known."""
    known = {
        "template": setting.template,
        "class_names": list(setting.class_names),
        "class_texts": {name: list(own) for name, own in setting.class_texts.items()},
        "multi_label": setting.multi_label,
    }
    content: dict[str, Any] = {name: value for name, value in known.items() if value}
    if setting.logit_bias is not None:
        content["logit_bias"] = setting.logit_bias
    if content:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / TEXT_SETTING).write_text(f"{text}\n", encoding="utf-8")
    if setting.rows is not None:
        rows = {"rows": setting.rows.detach().cpu().contiguous()}
        save_file(rows, folder / CLASS_ROWS, metadata={_ADAPTER: weights_digest(folder)})


def read_text_setting(folder: Path) -> TextSetting:
    """Read the settings of the adapter in this folder; without the files, none are known.

    Raises:
        ValueError: a file is damaged, or belongs to another adapter.
    """
    content: dict[str, Any] = {}
    if (folder / TEXT_SETTING).is_file():
        try:
            content = _read_content(folder / TEXT_SETTING)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{TEXT_SETTING} beside the adapter is damaged: {one_line(error)}") from error
    names = tuple(content.get("class_names", ()))
    rows = _read_rows(folder, len(names)) if (folder / CLASS_ROWS).is_file() else None
    texts = list_class_texts(content.get("class_texts"))
    kind = content.get("multi_label", False), content.get("logit_bias")
    return TextSetting(content.get("template"), names, rows, *kind, class_texts=texts)


def _read_content(file: Path) -> dict[str, Any]:
    content = read_json(file, _LARGEST)
    if not isinstance(content, dict) or not content.keys() <= _KEYS:
        raise ValueError(f"expected the keys {', '.join(sorted(_KEYS))}, got {short_repr(content)}")
    if "template" in content:
        check_template(content["template"])
    list_names(content.get("class_names", []))
    check_bool("multi_label", content.get("multi_label", False))
    if "logit_bias" in content:
        check_float("logit_bias", content["logit_bias"])
    list_class_texts(content.get("class_texts", {}))
    return content


def _read_rows(folder: Path, classes: int) -> Tensor:
    file = folder / CLASS_ROWS
    try:
        shapes = read_shapes(file)
        if [*shapes] != ["rows"] or len(shapes["rows"]) != 2 or shapes["rows"][0] != classes:
            raise ValueError(f"expected rows for {classes} classes, got {short_repr(shapes)}")
        with safe_open(file, "pt") as content:
            if (content.metadata() or {}).get(_ADAPTER) != weights_digest(folder):
                raise ValueError("it belongs to other weights than those of the adapter beside it")
        tensors = load_file(file)
        check_tensors(tensors)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{CLASS_ROWS} beside the adapter cannot be used: {one_line(error)}") from error
    return tensors["rows"]
