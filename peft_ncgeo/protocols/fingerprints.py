"""Fingerprints: short texts that change if anything that a run depends on changes: code, weights, images."""

from __future__ import annotations

import copyreg
import dis
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from functools import cached_property, singledispatchmethod
from operator import itemgetter
from pathlib import Path
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..data.checks import class_names
from ..data.sampling import encoded_images, label_array, stored_values
from ..training import Recipe
from ..validation import one_line, short_repr

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
# packages whose functions and classes count by name, as all in site-packages do, even if installed from a checkout
_LIBRARIES = {"accelerate", "datasets", "numpy", "peft", "peft_ncgeo", "torch", "transformers"}
_OF_A_FILE = {"_name_or_path", "_commit_hash", "transformers_version", "peft_version"}  # config fields without effect


def fingerprint(what: str, *parts: Any) -> str:
    """Return sixteen characters that change with any of the parts.

    - Tensors, arrays, data sets and models count by their numbers.
    - Functions and classes of libraries count by their names.
    - Other functions and classes count by their code (Python's bytecode, which may change with its version), the
      variables that they close over, and the globals that they read.
    - All other objects count by their pickled content.

    The order of a set or a dict does not count, and a list equals a tuple.

    Args:
        what: the thing that has these parts, for the error message.

    Raises:
        ValueError: a part that cannot be pickled, such as a lock, an open file or a generator, or a tensor that is not
            in memory.
    """
    try:
        return _Fingerprint([]).of(parts).hex()[:16]
    except _UnknownContentError as error:
        raise ValueError(
            f"{what} holds {error}, so it has no fingerprint and its runs cannot be resumed; create that object "
            "inside the function that uses it, or use numbers, texts, tensors or functions instead."
        ) from None
    except RecursionError:
        raise ValueError(
            f"{what} is nested too deep for a fingerprint; use fewer levels of lists, dicts or objects."
        ) from None


def recipe_fingerprint(recipe: Recipe) -> str:
    """Return the fingerprint of everything that a recipe makes, and of its arguments."""
    set_seed(0)  # losses may draw random initial weights
    made = recipe.config() if recipe.config else None, recipe.losses(), recipe.classification_loss()
    stages = [(stage.rows, recipe_fingerprint(stage)) for stage in recipe.stages]
    head = [recipe.head()] if recipe.head else []
    return fingerprint(f"Recipe {recipe.name!r}", *made, recipe.callbacks(), recipe.args, *stages, *head)


def dataset_fingerprint(dataset: Dataset, label_column: str) -> str:
    """Return the fingerprint of class names, labels and images; if a transform makes these, of all columns."""
    names, read = class_names(dataset, label_column, "a protocol"), dataset
    if dataset.format["type"] != "custom":
        images = [column for column, feature in dataset.features.items() if isinstance(feature, Image)]
        read = dataset.with_format(None).select_columns(images)
    return fingerprint("A data set", names, label_array(dataset, label_column), read)


class _UnknownContentError(Exception):
    """Error for an object whose content cannot be read; the text shows the object and says why."""


class _Fingerprint:
    """Digests of values, each computed from the digests of its parts.

    Args:
        open_values: ids of the values that are being read; the next value may be a part of them.
    """

    def __init__(self, open_values: list[int]) -> None:
        self._open = open_values
        # functions and classes by their ids, since they refer to each other
        self._known: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any) -> bytes:
        """Return the digest of a value of any kind."""
        if id(value) in self._open:
            return _digest("around", str(len(self._open) - self._open.index(id(value))))
        if isinstance(value, FunctionType | type):
            if id(value) in self._known:
                return _digest("known", str(self._known[id(value)][0]))
            self._known[id(value)] = len(self._known), value  # kept, so that no other object gets its id
        self._open.append(id(value))
        try:
            return self._of(value)
        finally:
            self._open.pop()

    def _all(self, kind: str, *values: Any) -> bytes:
        return _digest(kind, *map(self.of, values))

    def _apart(self, value: Any) -> bytes:
        """Return the digest of a value, independent of the values read before it."""
        return _Fingerprint(self._open).of(value)

    @singledispatchmethod
    def _of(self, value: Any) -> bytes:
        if type(value) in _PLAIN:
            return _digest(type(value).__name__, repr(value))
        if type(value) in (list, tuple):
            return self._all("sequence", *value)
        if type(value) in (set, frozenset):
            return _digest("set", *sorted(map(self._apart, value)))
        if type(value) in (dict, MappingProxyType):
            members = sorted(((self._apart(key), part) for key, part in value.items()), key=itemgetter(0))
            return _digest("mapping", *(digest for key, part in members for digest in (key, self.of(part))))
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            kept = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:  # objects may raise any type
            raise _UnknownContentError(f"{short_repr(value)} ({one_line(error)})") from None
        if isinstance(kept, str):  # the name of a global in its module
            module, inner = getattr(value, "__module__", None), getattr(value, "__wrapped__", None)
            return self._all("name", type(value), module, kept, inner)
        return self._all("object", *(list(part) if isinstance(part, Iterator) else part for part in kept))

    @_of.register(Tensor)
    def _of_tensor(self, value: Tensor) -> bytes:
        try:
            numbers = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
            content = hashlib.sha256(numbers.numpy().data).digest()
        except Exception as error:  # meta, sparse and quantised tensors raise different types
            raise _UnknownContentError(f"a tensor whose numbers cannot be read ({one_line(error)})") from None
        return _digest("tensor", str(value.dtype), str(list(value.shape)), str(value.requires_grad), content)

    @_of.register(np.ndarray)
    def _of_array(self, value: np.ndarray) -> bytes:
        if value.dtype.hasobject:
            return self._all("objects", list(value.shape), value.ravel().tolist())
        return _digest("array", str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).digest())

    @_of.register(FunctionType)
    def _of_function(self, value: FunctionType) -> bytes:
        module = value.__globals__.get("__name__", "")
        parts: list[Any] = [module, value.__qualname__, value.__closure__]
        own = _is_own(module)
        if own or "<" in value.__qualname__:  # lambdas and inner functions share names
            parts += [value.__code__, value.__defaults__, value.__kwdefaults__, vars(value)]
        if own:
            parts.append({name: value.__globals__[name] for name in _globals(value.__code__) & {*value.__globals__}})
        return self._all("function", *parts)

    @_of.register(type)
    def _of_class(self, value: type) -> bytes:
        parts: list[Any] = [value.__module__, value.__qualname__]
        if _is_own(value.__module__):
            methods = {name: part for name, part in vars(value).items() if isinstance(part, FunctionType)}
            others = {name: part for name, part in vars(value).items() if name[:2] != "__" and name != "_abc_impl"}
            parts += [value.__bases__, methods | others]
        return self._all("class", *parts)

    @_of.register(CodeType)
    def _of_code(self, value: CodeType) -> bytes:
        names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
        counts = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
        jumps = getattr(value, "co_exceptiontable", None)  # since Python 3.11
        return self._all("code", value.co_code, value.co_consts, names, counts, jumps)

    @_of.register(CellType)
    def _of_cell(self, value: CellType) -> bytes:
        try:
            return self._all("cell", value.cell_contents)
        except ValueError:
            return _digest("empty cell")

    @_of.register(MethodType)
    def _of_method(self, value: MethodType) -> bytes:
        return self._all("method", value.__func__, value.__self__)

    @_of.register(classmethod)
    @_of.register(staticmethod)
    def _of_wrapped(self, value: Any) -> bytes:
        return self._all(type(value).__name__, value.__func__)

    @_of.register(cached_property)
    def _of_cached(self, value: cached_property[Any]) -> bytes:
        return self._all("property", value.func)

    @_of.register(property)
    def _of_property(self, value: property) -> bytes:
        return self._all("property", value.fget, value.fset, value.fdel)

    @_of.register(ModuleType)
    def _of_module(self, value: ModuleType) -> bytes:
        file = getattr(value, "__file__", None)
        source = Path(file).read_bytes() if file and _is_own(value.__name__) else b""
        return _digest("module", value.__name__, source)

    @_of.register(Dataset)
    def _of_dataset(self, value: Dataset) -> bytes:
        parts: list[Any] = [value.format]
        for column, feature in sorted(value.features.items()):
            content = hashlib.sha256()
            if isinstance(feature, Image):
                for encoded in encoded_images(value, column):
                    content.update(hashlib.sha256(encoded).digest())
            else:
                for stored in stored_values(value, column):
                    content.update(self._apart(stored))
            parts += [column, repr(feature), content.digest()]
        return self._all("data set", *parts)

    @_of.register(nn.Module)
    def _of_layers(self, value: nn.Module) -> bytes:
        try:
            # parametrised modules cannot be pickled
            plain = is_parametrized(value) or not hasattr(value, "__getstate__")
            state = vars(value) if plain else value.__getstate__()
            # the keys of hooks are counters
            hooks = {name: [*part.values()] for name, part in state.items() if "_hooks" in name}
        except Exception as error:  # scripted modules, for example
            raise _UnknownContentError(f"{short_repr(value)} ({one_line(error)})") from None
        return self._all("layers", type(value), {**state, **hooks})

    @_of.register(PreTrainedModel)
    def _of_model(self, value: PreTrainedModel) -> bytes:
        kinds = {type(module) for module in value.modules()}
        shape = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # dropout, eps and similar settings
        return self._all("model", value.config, kinds, shape, value.state_dict(), dict(value.named_buffers()))

    @_of.register(PreTrainedConfig)
    def _of_config(self, value: PreTrainedConfig) -> bytes:
        return self._all("config", type(value), _without(_OF_A_FILE, value.to_dict()))

    @_of.register(PeftConfig)
    def _of_peft_config(self, value: PeftConfig) -> bytes:
        return self._all("config", type(value), _without(_OF_A_FILE, vars(value)))  # to_dict omits tensors

    @_of.register(PreTrainedTokenizerBase)
    def _of_tokenizer(self, value: PreTrainedTokenizerBase) -> bytes:
        words: Any = value.get_vocab()
        if value.is_fast:  # calls change truncation and padding
            words = _without({"truncation", "padding"}, json.loads(value.backend_tokenizer.to_str()))
        sides = value.padding_side, value.truncation_side, value.model_max_length
        return self._all("tokenizer", type(value), words, value.special_tokens_map, sides)


def _digest(kind: str, *parts: str | bytes) -> bytes:
    content = hashlib.sha256(kind.encode())
    for part in parts:
        encoded = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        content.update(len(encoded).to_bytes(8, "big") + encoded)
    return content.digest()


def _is_own(module: str) -> bool:
    """Return True for the user's own modules, whose code changes without a version."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    library = top in _LIBRARIES or top in sys.stdlib_module_names
    return not library and {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _globals(code: CodeType) -> set[str]:
    """Return the names of the globals that a function and the functions inside it read."""
    read = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return read.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _without(keys: set[str], value: Any) -> Any:
    """Return a copy of nested mappings without some keys."""
    return {k: _without(keys, v) for k, v in value.items() if k not in keys} if isinstance(value, dict) else value
