"""`geometry.json` beside an adapter: the template and the class names that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

from ..data.class_prompts import list_names
from ..files import read_json
from ..models.templates import check_template
from ..models.text_setting import TextSetting
from ..validation import one_line, short_repr

TEXT_SETTING = "geometry.json"
_KEYS = {"template", "class_names"}
_LARGEST = 2**24  # bytes; a hundred thousand names


def write_text_setting_file(folder: Path, setting: TextSetting) -> None:
    """Write the fields that are known; no file if none is."""
    known = {"template": setting.template, "class_names": list(setting.class_names)}
    content = {name: value for name, value in known.items() if value}
    if content:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / TEXT_SETTING).write_text(f"{text}\n", encoding="utf-8")


def read_text_setting_file(folder: Path) -> TextSetting:
    """Read the setting beside an adapter; without the file, nothing is known.

    Raises:
        ValueError: the file is damaged or was not written by this package.
    """
    file = folder / TEXT_SETTING
    if not file.is_file():
        return TextSetting()
    try:
        content = read_json(file, _LARGEST)
        if not isinstance(content, dict) or not content.keys() <= _KEYS:
            raise ValueError(f"expected the keys {', '.join(sorted(_KEYS))}, got {short_repr(content)}")
        template = content.get("template")
        if template is not None:
            check_template(template)
        return TextSetting(template, tuple(list_names(content.get("class_names", []))))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{TEXT_SETTING} beside the adapter is damaged: {one_line(error)}") from error
