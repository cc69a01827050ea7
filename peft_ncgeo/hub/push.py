"""Pushing an adapter to the Hub in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelInfo
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import AutoConfig

from ..classifiers.few_shot import FewShotClassifier, HeadClassifier
from ..loading.hub_errors import hub_errors
from ..loading.load import holds_head
from ..models.adapters import unwrap
from ..models.base_model import base_name, is_folder
from ..models.heads import linear_classifier, saved_head
from ..models.image_classifier import ImageClassifierConfig
from .record import TrainingRecord, record_model
from .save import OPTIONAL, published_model, save_adapter
from .secrets import refuse_secrets
from .space import check_space, push_space, write_space

_TOWERS = ("text_config", "vision_config")


def push_adapter(
    model: nn.Module | FewShotClassifier,
    repo_id: str,
    processor: Any = None,
    base_model_id: str | None = None,
    record: TrainingRecord | None = None,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    space_id: str | None = None,
    space_options: Mapping[str, Any] | None = None,
    **card: Any,
) -> CommitInfo:
    """Push the active adapter, its processor and a card, in one commit: completely or not at all.

    Args:
        model: a `PeftModel`, or a [`~peft_ncgeo.FewShotClassifier`] around one or with a head on cached features.
        repo_id: "user/name" or just the name; the repository is created if it does not exist.
        processor: processor to save beside the adapter. Default: loaded from the base model's name or path.
        base_model_id: Hub id of the base model, written into config and card. Default: the id that the model was
            loaded from, if it is one.
        record: record of the training for the card, from `trainer.record()`.
        commit_message: title of the commit.
        private: make a new repository private. Default: the account's setting.
        token: Hub token with write permission. Default: the one that `hf auth login` stored.
        revision: branch to push to. Default: main.
        create_pr: True: open a pull request in place of a commit.
        space_id: "user/name" of a Gradio Space where people can try the adapter; it is pushed after the adapter, and
            created if it does not exist.
        space_options: further arguments of [`~peft_ncgeo.hub.write_space`]: class_names, title, requirement.
        card: further arguments of [`create_card`]: license (default: the base model's), datasets, runs and so on.

    Returns:
        The result of `HfApi.upload_folder`: the commit's URL and hash.

    Raises:
        TypeError: the model is neither a `PeftModel` nor a few-shot classifier.
        ValueError: the base model is a folder, is not on the Hub or is of another kind (pass `base_model_id`); neither
            the adapter nor the base model holds the model's head; the head was fitted on a tuned model; the repository
            holds a model, or, for a head, an adapter; a Space cannot be made (`create_pr`, a wrong id, a model without
            classes); or a file or `commit_message` holds a path of this machine or a token.
        OSError: there is no token, it has no write permission, or the connection broke. Then the repository is
            unchanged, or the message says that only the Space was not pushed.

    Example:

    ```python
    push_adapter(trainer.model, "user/adapter", trainer.processing_class, record=trainer.record(), license="mit")
    ```
    """
    if space_id is not None:
        check_space(model, space_id, create_pr)
    base, repo_id = check_push(model, repo_id, base_model_id, token)
    api = HfApi(token=token)
    if card.get("license") is None:
        card["license"] = getattr(base.card_data, "license", None)
    if revision is not None and not create_pr:
        card.setdefault("revision", revision)
    with TemporaryDirectory() as folder, TemporaryDirectory() as space:
        if space_id is not None:  # before the push: its arguments may be refused
            write_space(space, model, repo_id, revision=revision, **(space_options or {}))
        save_adapter(model, folder, processor, base.id, record, repo_id=repo_id, **card)
        texts = {"commit_message": commit_message, "revision": revision, "repo_id": repo_id}
        refuse_secrets(Path(folder), base_name(published_model(model)), token, texts)
        with hub_errors(f"{repo_id} was not pushed"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=list(OPTIONAL),
            )
        if space_id is not None:
            push_space(Path(space), space_id, private, token)
    return commit


def check_push(
    model: Any, repo_id: str, base_model_id: str | None = None, token: str | None = None
) -> tuple[ModelInfo, str]:
    """Check before a push everything that can be checked without pushing; see [`push_adapter`] for the errors.

    Returns:
        The base model on the Hub, and the full id of the repository.
    """
    tuned = published_model(model)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the id of a repository: {error}") from error
    base = _base_on_hub(base_model_id or base_name(tuned), base_model_id is not None, token)
    _check_base(tuned, base.id, token)
    api = HfApi(token=token)
    with hub_errors(f"{repo_id} was not pushed"):
        user = api.whoami()["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        holds_model = api.file_exists(repo_id, "config.json")
        holds_adapter = isinstance(model, HeadClassifier) and api.file_exists(repo_id, CONFIG_NAME)
    if holds_model:  # the push would replace its tokenizer
        raise ValueError(f"{repo_id} holds a model (config.json); push the adapter to a repository of its own.")
    if holds_adapter:
        raise ValueError(f"{repo_id} holds an adapter ({CONFIG_NAME}); push the head to a repository of its own.")
    return base, repo_id


def _base_on_hub(name: str, given: bool, token: str | None) -> ModelInfo:
    mend = "push it as a repository of its own and pass base_model_id"
    if not name:
        raise ValueError(f"Others cannot load the base model, whose source is not known; {mend}.")
    if not given and is_folder(name):
        raise ValueError(
            f"The base model was loaded from the folder {Path(name).name!r}, which others do not have; {mend}."
        )
    try:
        with hub_errors(f"base_model_id={name!r} cannot be looked up"):
            return HfApi(token=token).model_info(name)
    except HFValidationError as error:
        raise ValueError(f"base_model_id={name!r} is not the id of a model on the Hub; {mend}.") from error
    except OSError as error:
        cause = error.__cause__  # with status 401 the token may be at fault
        if isinstance(cause, RepositoryNotFoundError) and cause.response.status_code == 404:
            raise ValueError(f"The Hub has no model base_model_id={name!r} that others can load; {mend}.") from error
        raise


def _check_base(model: nn.Module, base_model_id: str, token: str | None) -> None:
    """Check by its config that the adapter fits the model that others will load under that id."""
    own = unwrap(model).config
    with hub_errors(f"base_model_id={base_model_id!r} holds no model"):
        base = AutoConfig.from_pretrained(base_model_id, token=token, trust_remote_code=False)
    # a single tower, clip_vision_model, can be loaded from a whole clip
    if not own.model_type.startswith(base.model_type):
        raise ValueError(
            f"base_model_id={base_model_id!r} is a {base.model_type}, but the model is a {own.model_type}; pass the "
            "id of the model that was tuned."
        )
    differing = [name for name in ("hidden_size", "num_hidden_layers", "projection_dim") if _differs(own, base, name)]
    if own.model_type == base.model_type and differing:
        raise ValueError(
            f"base_model_id={base_model_id!r} differs from the model in {', '.join(differing)}; pass the id of the "
            "model that was tuned."
        )
    if not isinstance(model, PeftModel) or record_model(model).kind != "head":
        return
    head = linear_classifier(model)
    brought = holds_head(get_peft_model_state_dict(model), model)
    there = isinstance(base, ImageClassifierConfig)
    there |= any(name.endswith("ForImageClassification") for name in base.architectures or [])
    if not brought and (not there or (head is not None and len(head.weight) != base.num_labels)):
        raise ValueError(
            f"Neither the adapter nor {base_model_id} holds the model's head, so others would get a random one; train "
            f"it with {saved_head(model)}."
        )


def _differs(own: Any, base: Any, name: str) -> bool:
    pairs = [(own, base), *((getattr(own, part, None), getattr(base, part, None)) for part in _TOWERS)]
    return any(getattr(one, name, None) != getattr(other, name, None) for one, other in pairs)
