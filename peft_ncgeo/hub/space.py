"""Space of the Hub where people can try an adapter in their browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..classifiers.few_shot import FewShotClassifier, HeadClassifier
from ..loading.hub_errors import hub_errors
from ..models.adapters import unwrap
from ..models.heads import classifier
from ..models.towers import reads_text
from .secrets import refuse_secrets


def write_space(
    folder: str | Path,
    model: Any,
    repo_id: str,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    requirement: str = "peft_ncgeo[demo]",
    revision: str | None = None,
) -> Path:
    """Write the files of a Gradio Space: `app.py`, `requirements.txt` and `README.md` with the Space's metadata.

    Args:
        folder: folder to write them to; files of these names are replaced.
        model: the model that was pushed: a `PeftModel` of a dual encoder or an image classifier, or a
            [`~peft_ncgeo.FewShotClassifier`].
        repo_id: the adapter's repository.
        class_names: names in the box of a classifier that reads them. Default: those of its training.
        title: heading of the page. Default: the name of the repository.
        requirement: requirement for pip: a name with the extra "demo" or, for a package that is in no index,
            "peft_ncgeo[demo] @ git+https://...".
        revision: branch of the adapter. Default: main.

    Returns:
        The folder.

    Raises:
        ValueError: the model neither reads class names nor has a head, or `class_names` is given for a classifier with
            classes of its own.
    """
    loader = _loader(model)
    if class_names is not None and not (loader == "ZeroShotClassifier" or _takes_names(model)):
        raise ValueError("The classifier has classes of its own; leave class_names out of the Space.")
    folder, title = Path(folder), title or repo_id.rpartition("/")[2]
    at = "" if revision is None else f", revision={revision!r}"
    names = "" if class_names is None else f", class_names={list(class_names)!r}"
    metadata = {"title": title, "sdk": "gradio", "app_file": "app.py", "models": [repo_id]}
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    files = {
        "app.py": _APP.format(loader=loader, source=f"{repo_id!r}{at}", options=f"{names}, title={title!r}"),
        "requirements.txt": f"{requirement}\n",
        "README.md": _README.format(metadata=front, id=repo_id),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def check_space(model: Any, space_id: str, create_pr: bool) -> None:
    """Raise an error for a Space that cannot be made, before anything is pushed; see [`push_space`]."""
    _loader(model)
    if create_pr:
        raise ValueError("A Space loads a branch, not a pull request; leave out space_id or create_pr.")
    try:
        validate_repo_id(space_id)
    except HFValidationError as error:
        raise ValueError(f"space_id={space_id!r} is not the id of a Space: {error}") from error


def push_space(folder: Path, space_id: str, private: bool | None, token: str | None) -> CommitInfo:
    """Push the files of a Space in one commit; the Space is created if it does not exist.

    Raises:
        OSError, ValueError: as [`~peft_ncgeo.hub.push_adapter`].
    """
    refuse_secrets(folder, "", token, {"space_id": space_id})
    api = HfApi(token=token)
    with hub_errors(f"The Space {space_id} was not pushed"):
        url = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=url.repo_id, repo_type="space", folder_path=folder, commit_message="Upload demo"
        )


def _loader(model: Any) -> str:
    """Return the name of the class that loads the classifier from its repository."""
    if isinstance(model, FewShotClassifier):
        return "FewShotClassifier"
    if reads_text(model):
        return "ZeroShotClassifier"
    if classifier(model) is not None:
        return "TrainedClassifier"
    raise ValueError(
        f"{type(unwrap(model)).__name__} neither reads class names nor has a classification head, so a Space has "
        "nothing to show; leave out space_id."
    )


def _takes_names(model: Any) -> bool:
    return isinstance(model, HeadClassifier) and model.head.takes_new_names


_APP = """from peft_ncgeo import {loader}
from peft_ncgeo.demo_app import build_app

classifier = {loader}.from_pretrained({source})
app = build_app(classifier{options})

if __name__ == "__main__":
    app.launch()
"""
_README = """---
{metadata}---

Demo of the adapter [{id}](https://huggingface.co/{id}). `app.py` loads it and shows it with Gradio.
"""
