"""Loading of a model by its name: a dual encoder, or an image classifier with one output for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
)

from ..data.head_names import head_names, same_names
from ..models.templates import spelled
from ..validation import OF_THE_MACHINE, one_line, short_repr
from .load import holds_head

# options that say where the files are, which the config is read with too
_OF_FILES = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder")
# options that are set here -> why they cannot be given
_NOT_TAKEN = {
    "config": "is read from the model's own files",
    "id2label": "comes from the training set",
    "ignore_mismatched_sizes": "is always set here, and used only for the head",
    "label2id": "comes from the training set",
    "num_labels": "comes from the training set",
    "output_loading_info": "would return a report that nothing reads here",
    "token": "would be written into logs and checkpoints; log in with `hf auth login`",
    "trust_remote_code": "would run code from a repository; load such a model yourself and pass it",
}


class LoadedModel(NamedTuple):
    """A model, and the reason why its head must be trained, as words after "The head"; empty if the head fits."""

    model: nn.Module
    untrained: str = ""


def check_options(options: Any, name: str = "model_init_kwargs") -> dict[str, Any]:
    """Return options of `from_pretrained` as a dict.

    Raises:
        ValueError: `options` is not a dict with names as keys, or has an option that cannot be given here.
    """
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"{name}={short_repr(options)} must be a dict, such as {{'revision': 'main'}}.")
    for key, reason in _NOT_TAKEN.items():
        if key in options:
            raise ValueError(f"{name} names {key!r}, which {reason}; leave it out.")
    return dict(options)


def load_base_model(
    name: str, class_names: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> LoadedModel:
    """Load a dual encoder, or an image classifier, from a folder or the Hub.

    The kind of model is read from the `architectures` of its config: a class that gives features of texts and of
    images is loaded by `AutoModel`; an ...ForImageClassification model, or a backbone for which such a class exists,
    by `AutoModelForImageClassification`. The head of a classifier is kept if it has as many outputs as there are
    classes; otherwise a new random head replaces it. A kept head fits only if its outputs have the names of the
    classes.

    Args:
        class_names: names of the classes; an empty list keeps the head of the files.
        options: options for `from_pretrained`, such as `revision` and `dtype`.

    Raises:
        OSError: there is no such model, or its files cannot be read.
        ValueError: `name` is not a name, the model is of another kind, it is an adapter, weights other than the head's
            are missing, or the model does not know an option.
    """
    options = check_options(options or {})
    if not (name and Path(name).is_dir()):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"model={short_repr(name)} is neither a folder nor the id of a repository on the Hub; check it."
            ) from error
    if (Path(name) / CONFIG_NAME).is_file():
        raise ValueError(
            f"{name} holds an adapter ({CONFIG_NAME}); name the base model, or load both with "
            "PeftModel.from_pretrained(base, folder, is_trainable=True) and pass that."
        )
    if options.get("revision") and Path(name).is_dir():
        raise ValueError(f"The folder {name} has no revisions; leave out revision={options['revision']!r}.")
    of_files = {key: value for key, value in options.items() if key in _OF_FILES}
    config = _load(f"The model {name}", AutoConfig, name, of_files)
    if _reads_texts_and_images(config):
        model, told = _load(f"The model {name}", AutoModel, name, {**options, "output_loading_info": True})
        _check_complete(name, told, [])
        return LoadedModel(model)
    _check_classifier(name, config)
    keeps_head = not class_names or (config.num_labels == len(class_names) and _has_head(config))
    labels = {} if keeps_head else dict(enumerate(class_names))
    given = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}} if labels else {}
    given |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, told = _load(f"The model {name}", AutoModelForImageClassification, name, {**options, **given})
    new = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    of_head = [key for key in new if holds_head([f".{key}"], model)]
    _check_complete(name, told, of_head)
    if of_head:
        return LoadedModel(model, "is new")
    # the order does not matter here: a wrong order is refused later, when the data set is compared with the head
    one, other = (
        sorted(names, key=lambda name: spelled(name).casefold()) for names in (head_names(model), class_names)
    )
    fits = not class_names or same_names(one, other)
    return LoadedModel(model, "" if fits else "has outputs of other names")


def _load(what: str, auto: Any, name: str, options: Mapping[str, Any]) -> Any:
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except OF_THE_MACHINE:
        raise
    except TypeError as error:  # an option that neither the config nor the model's class has
        raise ValueError(f"{what} does not take these model_init_kwargs: {one_line(error)}.") from error
    except Exception as error:  # the Hub, safetensors and configs raise many types
        raise OSError(f"{what} cannot be loaded: {one_line(error)}") from error


def _architecture(config: Any) -> str:
    return str(next(iter(getattr(config, "architectures", None) or []), ""))


def _reads_texts_and_images(config: Any) -> bool:
    found = getattr(transformers, _architecture(config), None) if _architecture(config) else None
    both = hasattr(found, "get_text_features") and hasattr(found, "get_image_features")
    return both and found is MODEL_MAPPING.get(type(config), None)


def _has_head(config: Any) -> bool:
    """Return True if the files hold an image classifier, not only a backbone."""
    return _architecture(config) in _names(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, config) or _is_of_timm(config)


def _is_of_timm(config: Any) -> bool:
    return getattr(config, "model_type", None) == "timm_wrapper"  # its configs name timm's own architectures


def _names(mapping: Any, config: Any) -> list[str]:
    """Return the names of a mapping's classes, without classes from the code of a repository."""
    found = mapping.get(type(config), None)
    classes = [each for each in (found if isinstance(found, tuple | list) else [found]) if each is not None]
    return [each.__name__ for each in classes if each.__module__.split(".")[0] in ("transformers", "peft_ncgeo")]


def _check_classifier(name: str, config: Any) -> None:
    classifiers = _names(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, config)
    if classifiers and (_has_head(config) or _architecture(config) in _names(MODEL_MAPPING, config)):
        return
    found = _architecture(config) or f"{type(config).__name__} without architectures"
    raise ValueError(
        f"{name} is a {found}, not known as a dual encoder (such as CLIPModel), an image classifier "
        "(...ForImageClassification) or its backbone; load the model yourself and pass it."
    )


def _check_complete(name: str, told: Mapping[str, Any], of_head: Sequence[str]) -> None:
    """Raise an error if the files lack weights, which would be random."""
    new = {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])} - set(of_head)
    if new:
        raise ValueError(
            f"The files of {name} lack {len(new)} weights of the model, such as {min(new)}, which would be random; "
            "load the model yourself and pass it."
        )
