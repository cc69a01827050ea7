"""Load an adapter, from a folder or from the Hub, onto its base model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from ..data.class_prompts import list_names
from ..data.head_names import CLASS_NAMES, write_head_names, write_label_kind
from ..files import read_json
from ..models.adapters import adapter_parameters, base_change_of, check_adapter_weights
from ..models.devices import is_offloaded
from ..models.heads import head_path, linear_classifier
from ..models.image_classifier import ImageClassifierModel
from ..models.precision import hold_in_float32
from ..models.snapshots import unchanged_on_error
from ..models.tensor_files import read_shapes
from ..models.text_setting import remember_text_setting
from ..tuners.own_configs import own_configs
from ..validation import OF_THE_MACHINE, check_path, one_line, short_repr
from .hub_errors import hub_errors
from .patterns import check_patterns
from .size_limit import SizeLimit
from .text_setting_file import TEXT_FILES, read_text_setting

PROTOTYPES = "prototypes.safetensors"
HEAD = "head.safetensors"  # a head on cached features, which needs no adapter
HEAD_FOLDER = "head"  # in an adapter's folder: that of a head which was fitted on the tuned model
_MODEL = "config.json"  # of a whole model or an exported classifier
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Fields that make PEFT's X-LoRA, Shadow and multitask prompts read weights from other files, some of them pickles.
_ELSEWHERE = ("adapters", "shadow_model", "prompt_tuning_init_state_dict_path")


def load_adapter(
    repo_id: str | Path,
    base_model: nn.Module | str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> PeftModel:
    """Load an adapter onto its base model, and return the tuned model in evaluation mode.

    Only the adapter's own safetensors file is read. Weights in a pickle are refused, and so are PEFT adapters that
    read weights from other files (X-LoRA, Shadow, multitask prompts). Config and weights from the Hub belong to the
    same commit.

    Args:
        repo_id: Hub repository or local folder with `adapter_config.json` and `adapter_model.safetensors`.
        base_model: the model to adapt, or the name or folder to load it from. Default: the one named in the adapter's
            config, at the revision named there. A model that needs code of its own is refused: load it yourself and
            pass it.
        revision: branch, tag or commit of the repository. With a revision, `repo_id` is never read as a folder.
        token: Hub token for a private repository. Default: the one that `hf auth login` stored.

    Raises:
        OSError: there is no such repository, revision or base model, or the Hub cannot be reached.
        ValueError: the folder or repository holds no adapter in safetensors; no base model is known; the file is
            damaged; it does not fit the model (the message names a missing or unexpected weight); or the config asks
            for much more memory than the file and the model need.
        TypeError: `repo_id` is neither a string nor a path.
    """
    folder = fetch_adapter(repo_id, revision, token)
    config, shapes, names = read_config(folder, repo_id), _read_shapes(folder, repo_id), _class_names(folder)
    given, setting = _read_weights(folder, repo_id), read_text_setting(folder)
    if not isinstance(base_model, nn.Module):
        base_model = _load_base(config, check_path("base_model", base_model), shapes, names, token)
    heads = [shape for name, shape in shapes.items() if holds_head([name], base_model)]
    if names and heads and not any(shape[:1] == (len(names),) for shape in heads):
        raise ValueError(
            f"{CLASS_NAMES} beside the adapter {repo_id} has {len(names)} names, but no weight of the head in its "
            "file has as many rows; write one name for each output of the head."
        )
    with unchanged_on_error(base_model, copy_weights=_may_change_base(config)):
        model = _put_on(base_model, config, folder, given, f"The adapter file in {repo_id} does not fit the model")
        head = linear_classifier(model)
        if names and head is not None and len(head.weight) != len(names):
            outputs = len(head.weight)
            raise ValueError(
                f"{CLASS_NAMES} beside the adapter has {len(names)} names, but the model has {outputs} outputs; write "
                "one name for each output."
            )
        if names:
            write_head_names(model, names)
        if head_path(model) is not None:
            write_label_kind(model, setting.multi_label)
        remember_text_setting(model, setting, [model.active_adapter])
        return model.eval()


def _may_change_base(config: PeftConfig) -> bool:
    """Return True unless adapters of this kind are known to leave the base model's weights unchanged.

    Those of this package do, and LoRA.
    """
    known = isinstance(config, (LoraConfig, *own_configs().values()))
    return not known or bool(base_change_of(config))


def _is_whole_in_file(config: PeftConfig) -> bool:
    """Return True if adapters of this kind are known to need little more memory than their file."""
    return not _may_change_base(config) and not getattr(config, "use_dora", False)  # DoRA needs an identity


def _put_on(base: nn.Module, config: PeftConfig, folder: Path, given: dict[str, Tensor], unfit: str) -> PeftModel:
    in_file = sum(tensor.numel() for tensor in given.values())
    in_model = sum(parameter.numel() for parameter in base.parameters())
    limit = SizeLimit(16 * in_file if _is_whole_in_file(config) else 4 * (in_file + in_model))
    try:
        with limit:
            config.inference_mode = True
            if is_offloaded(base):  # PEFT would look for wrapped weights in offload files, which lack them
                model = PeftModel(base, config)
                if not any(parameter.is_meta for parameter in adapter_parameters(model)):  # else refused below
                    set_peft_model_state_dict(model, dict(given))
            else:
                model = PeftModel.from_pretrained(base, str(folder), config=config)
    except OF_THE_MACHINE:
        raise
    except KeyError as error:  # PEFT looks the weights of modules_to_save up by name
        raise ValueError(f"{unfit}: missing {error}.") from error
    except Exception as error:  # torch lists all tensors of other shapes; PEFT methods raise many types
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if type(error) is RuntimeError and not lines:
            raise
        raise ValueError(f"{unfit}: {lines[0] if lines else one_line(error)}") from error
    finally:
        limit.left = math.inf  # in case Ctrl-C stopped the exit of the limit
    check_adapter_weights(model)
    if hold_in_float32(model):  # loading had rounded float32 weights to the base model's precision
        set_peft_model_state_dict(model, dict(given))
    loaded = get_peft_model_state_dict(model)
    differing = sorted(loaded.keys() ^ given.keys())
    if differing:
        which = "unexpected" if differing[0] in given else "missing"
        raise ValueError(f"{unfit}: {which} {differing[0]} (of {len(differing)}).")
    for name, tensor in given.items():
        if tensor.is_floating_point() != loaded[name].is_floating_point():
            raise ValueError(f"{unfit}: {name} has {tensor.dtype}, the model has {loaded[name].dtype} there.")
    return model


def fetch_files(repo_id: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder with the files of an adapter or a head; any of the files may be missing.

    Raises:
        OSError, TypeError, ValueError: there is no such folder or repository.
    """
    if not isinstance(repo_id, str | os.PathLike):
        raise TypeError(f"repo_id must be a folder or a repository of the Hub, got {type(repo_id).__name__}.")
    folder = Path(repo_id)
    if revision or not folder.is_dir():  # a folder has no revisions, so the Hub is asked for one
        # only the adapter's files, never the gigabytes of a whole model
        wanted = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CLASS_NAMES, PROTOTYPES, HEAD, f"{HEAD_FOLDER}/{HEAD}"]
        wanted += [*TEXT_FILES, *PROCESSOR_FILES]
        try:
            at = f" at revision {revision}" if revision else ""
            with hub_errors(f"The adapter {repo_id}{at} cannot be loaded"):
                folder = Path(snapshot_download(str(repo_id), revision=revision, token=token, allow_patterns=wanted))
        except HFValidationError as error:
            if folder.is_dir():
                raise ValueError(f"The folder {repo_id} has no revisions; leave out revision={revision!r}.") from error
            raise OSError(
                f"{repo_id} is neither a folder nor the id of a repository on the Hub; check its spelling."
            ) from error
    return folder


def fetch_adapter(repo_id: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the folder that holds the adapter: the given one, or the Hub's cached copy of one commit.

    Raises:
        OSError, TypeError, ValueError: as in [`load_adapter`].
    """
    folder = fetch_files(repo_id, revision, token)
    refuse_unsaved(folder, repo_id)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(
                f"{repo_id} has no {name}, so it cannot be loaded as an adapter (pickles are not read); save the "
                "adapter again if saving was interrupted."
            )
    return folder


def refuse_unsaved(folder: Path, repo_id: str | Path) -> None:
    """Raise an error for a local folder that holds nothing that can be loaded, but perhaps checkpoints.

    Args:
        folder: what [`fetch_files`] returned for `repo_id`.

    Raises:
        ValueError: the folder has none of the files of an adapter, a head or a model; the message names its newest
            checkpoint with an adapter.
    """
    of_hub = folder != Path(repo_id)  # a whole model's own files are not fetched
    if of_hub or any((folder / name).is_file() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, HEAD, _MODEL)):
        return
    last = get_last_checkpoint(folder)
    begun = last is not None and (Path(last) / CONFIG_NAME).is_file()
    raise ValueError(
        f"{repo_id} has no {CONFIG_NAME}, and holds no adapter, exported classifier or head; call "
        f"trainer.save_model(){f', or name its newest checkpoint, {last}' if begun else ', or name another folder'}."
    )


def read_config(folder: Path, repo_id: str | Path) -> PeftConfig:
    """Read the adapter's config in a folder that [`fetch_adapter`] returned for `repo_id`.

    Raises:
        ValueError: the config is damaged, has a type that PEFT does not know, or reads weights outside its own file.
    """
    try:
        read_json(folder / CONFIG_NAME)  # checks the file's size and depth before PEFT reads it
        config = PeftConfig.from_pretrained(str(folder))
        check_path("base_model_name_or_path", config.base_model_name_or_path)
        if config.peft_type is None:
            raise ValueError("it names no peft_type")
        check_patterns(vars(config))
    except KeyError as error:
        raise ValueError(
            f"The adapter in {repo_id} is of the type {error}, which PEFT does not know; import its package first."
        ) from error
    except Exception as error:  # a field of the file may hold anything
        raise ValueError(f"{CONFIG_NAME} in {repo_id} is damaged: {one_line(error)}") from error
    for name in _ELSEWHERE:
        place = getattr(config, name, None)
        if place and place != "mirror":  # Shadow's value for a part that it creates again
            raise ValueError(
                f"The adapter in {repo_id} reads {name}={short_repr(place)} beside its own file, which is not "
                "supported here; load it with PEFT."
            )
    return config


def _read_shapes(folder: Path, repo_id: str | Path) -> dict[str, tuple[int, ...]]:
    try:
        return read_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"The adapter file in {repo_id} is damaged or truncated ({one_line(error)}).") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"The adapter file in {repo_id} cannot be read: {one_line(error)}.") from error


def _read_weights(folder: Path, repo_id: str | Path) -> dict[str, Tensor]:
    given = load_peft_weights(str(folder), device="cpu")
    for name, tensor in given.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(
                f"The adapter file in {repo_id} is damaged: {name} has numbers that are not finite; save it again."
            )
    return given


def holds_head(keys: Iterable[str], model: nn.Module) -> bool:
    """Return True if an adapter with weights of these names has a classification head for a model."""
    path = head_path(model)
    return path is not None and any(f".{path}." in key for key in keys)


def _load_base(
    config: PeftConfig,
    name_or_path: str | None,
    shapes: dict[str, tuple[int, ...]],
    names: list[str],
    token: str | None,
) -> nn.Module:
    name_or_path = name_or_path or config.base_model_name_or_path
    if not name_or_path:
        raise ValueError("The adapter's config names no base model; pass base_model.")
    name = str(name_or_path)
    revision = config.revision if name == config.base_model_name_or_path else None
    if revision and Path(name).is_dir():
        raise ValueError(
            f"The adapter is for {name} at revision {revision}, but the local folder {name} has no revisions; pass "
            "base_model, loaded from that revision."
        )
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    classes = {"ImageClassifier": ImageClassifierModel, ImageClassifierModel.__name__: ImageClassifierModel}
    class_name = str(mapping.get("base_model_class"))
    base_class: Any = classes.get(class_name) or getattr(transformers, class_name, None)
    if not hasattr(base_class, "from_pretrained"):
        base_class = transformers.AutoModel
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    if names and any(shape[:1] == (len(names),) for shape in shapes.values()):  # the file may hold a head of this size
        options |= {"num_labels": len(names), "ignore_mismatched_sizes": True}
    try:
        model, told = base_class.from_pretrained(name, token=token, output_loading_info=True, **options)
    except OF_THE_MACHINE:
        raise
    except Exception as error:  # the Hub and safetensors raise many types, and so does a config with wrong values
        at = f" at revision {revision}" if revision else ""
        said = f"Its file is damaged or truncated: {error}" if isinstance(error, SafetensorError) else one_line(error)
        raise OSError(f"The base model {name}{at} cannot be loaded; pass base_model. ({said})") from error
    new = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    random, brings_head = holds_head([f".{key}" for key in new], model), holds_head(shapes, model)
    if not brings_head and (random or (names and model.config.num_labels != len(names))):
        raise ValueError(f"Neither the adapter nor {name} holds the head; pass a base_model whose head was trained.")
    return model


def _class_names(folder: Path) -> list[str]:
    """Return the names of an image classifier's outputs; an empty list if they are not known."""
    file = folder / CLASS_NAMES
    if not file.is_file():
        return []
    try:
        return list_names(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{CLASS_NAMES} beside the adapter is damaged: {one_line(error)}") from error
