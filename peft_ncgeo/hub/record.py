"""Records of a training for its model card."""

from __future__ import annotations

import inspect
import os
import platform
import re
from collections.abc import Container
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import Enum
from importlib.metadata import version
from typing import Any

import numpy as np
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from ..metrics.accuracy import harmonic_mean
from ..models.adapters import unwrap
from ..models.base_model import base_name, is_folder
from ..models.heads import classification_head
from ..models.post_hoc import changes_after_training
from ..models.text_setting import adapter_text_setting
from ..models.towers import find_towers, reads_text
from ..tuners.copa import CoPAConfig

GROUPS = ("many", "medium", "few")
LIBRARIES = ("peft_ncgeo", "peft", "transformers", "torch", "accelerate", "datasets")
# Arguments about logging, storage and devices, not about learning; some hold paths or tokens.
_ASIDE = re.compile(
    "accelerator_config|dataloader_(?!drop_last)|ddp|deepspeed|disable_tqdm|do_|eval|fsdp|hub|ignore_data|include_|"
    "label_names|local_|log|model_init|output|parallelism|past_|per_device_eval|prediction_loss|project|push|remove_unused|report|"
    "restore_|resume_|run|save|skip_|torch_|trackio|use_|_"
)
# Arguments that readers look for, with or without their default.
_ALWAYS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "augmentation",
    "class_balanced_sampling",
    "seed",
)
# Fields of every PEFT config, and fields that PEFT fills in when it makes an adapter.
_OF_EVERY_CONFIG = {entry.name for entry in fields(PeftConfig)} | {"token_ids", "tokenizer_name_or_path"}


@dataclass
class Component:
    """A config, a loss or a callback: its class, and its settings that differ from the defaults."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainingRecord:
    """Record of a training in plain values that JSON can store; `TrainingRecord.from_dict` reads them back.

    Attributes:
        task: the Hub's pipeline tag.
        kind: how the adapter is used: "text" (it reads class names), "head", "few-shot",
            "cached" (a head on cached features) or "features".
        adapter: the PEFT config, or the head if the kind is "cached".
        base_model: source of the base model, a Hub id or the absolute path of a folder.
        template: text around a class name; None for an image classifier.
        terms: classification loss, losses and callbacks.
        class_names, class_counts: names of the training set's classes, and their numbers of images, (K,).
        unlabelled: number of training images, if not all of them have labels; then there are no `class_counts`.
        teacher: the model from whose logits the student learned, or None.
        arguments: training arguments that differ from the defaults, followed by others that matter.
        changed: number of `arguments` that differ from the defaults.
        seed, steps, epochs, processes, device: those of the run.
        base_changed: reason why `sets` have no `before`: the model without its adapter is not the pretrained one.
        sets: evaluation set -> `size`, `classes`, `trained` (True if its classes are those of training), `before` and
            `after`, the metrics with the adapter off and on, as shares in 0..1. Numbers of the user's
            `compute_metrics` are in their `own`, as they were returned.
        reports: evaluation set -> scores, see [`~peft_ncgeo.reports.Report.to_dict`], for the first set with the
            classes of training, and for each set that `trainer.report()` was called with.
        leave_one_out: accuracy of the support images of a few-shot adaptation, `before` and `after`, see
            [`~peft_ncgeo.adapt`].
        geometry_set: name of the set, with the training classes, whose geometry is shown.
        thresholds: limits of the groups many / medium / few, see
            [`~peft_ncgeo.metrics.accuracy.class_groups`]; None for equal counts.
        dtype: dtype of the base model's weights.
        runs: metrics of several seeds, each with its `seed`.
        multi_label: True if an image may have any number of labels; `class_counts` then count each label, and the
            metrics are those of [`~peft_ncgeo.metrics.multi_label.multi_label_scores`].
        post_hoc: changes of the adapter after its training, as text, with the way in which their strength was chosen.
        class_rows: True if rows of weights were trained for the classes, which take the place of their texts.
        class_texts: texts of some classes, by name, in place of the template.
        snapshots: class means and classifier weights (K, d) before and after training, for a figure; not kept in JSON.
    """

    task: str
    adapter: Component
    base_model: str | None = None
    template: str | None = None
    terms: list[Component] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)
    unlabelled: int = 0
    teacher: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    changed: int = 0
    seed: int | None = None
    steps: int = 0
    epochs: float = 0.0
    processes: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    base_changed: str = ""
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    leave_one_out: dict[str, float] = field(default_factory=dict)
    geometry_set: str | None = None
    thresholds: list[float] | str | None = None
    runs: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    snapshots: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    kind: str = ""
    class_rows: bool = False
    multi_label: bool = False
    post_hoc: list[str] = field(default_factory=list)
    class_texts: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.kind:  # records of version 0.1.0 do not have it
            kinds = {"zero-shot-image-classification": "text", "image-classification": "head"}
            few_shot = self.task == "image-classification" and self.adapter.name == CoPAConfig.__name__
            self.kind = "few-shot" if few_shot else kinds.get(self.task, "features")

    @property
    def metric(self) -> str:
        """Name of the metric in `sets` that tables show."""
        return "map" if self.multi_label else "accuracy"

    def row(self, moment: str = "after") -> dict[str, float]:
        """Return the known accuracies in percent: of each set, "H" of base and new, and many / medium / few.

        For multi-label sets they are mean average precisions. The row also has the key "seed", so that rows of several
        runs can be the `runs` of a card. A set whose name is one of these other keys gets " (set)" after its name.
        """
        shares: dict[str, Any] = {
            f"{name} (set)" if name in ("H", "seed", *GROUPS) else name: entry.get(moment, {}).get(self.metric)
            for name, entry in self.sets.items()
        }
        if shares.get("base") is not None and shares.get("new") is not None:
            shares["H"] = harmonic_mean(shares["base"], shares["new"])
        groups = self.sets.get(self.geometry_set or "", {}).get(moment, {})
        shares |= {group: groups.get(group) for group in GROUPS}
        seed = {} if self.seed is None else {"seed": self.seed}
        return {**seed, **{name: 100 * share for name, share in shares.items() if share is not None}}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but `snapshots`."""
        snapshots, self.snapshots = self.snapshots, None
        try:
            values = asdict(self)
        finally:
            self.snapshots = snapshots
        del values["snapshots"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingRecord:
        parts = {
            "adapter": Component(**values["adapter"]),
            "terms": [Component(**term) for term in values.get("terms", [])],
        }
        return cls(**{**values, **parts})


def check_peft_model(model: Any) -> PeftModel:
    """Return the model if it is a `PeftModel`.

    Raises:
        TypeError: the model is not a `PeftModel`.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"Expected a PeftModel, got {type(model).__name__}; make one with get_peft_model(model, config)."
        )
    return model


def record_model(model: nn.Module, adapter_name: str | None = None) -> TrainingRecord:
    """Return the record of a `PeftModel`'s adapter, by default the active one, with the values that the model knows.

    Raises:
        TypeError: the model is not a `PeftModel`.
    """
    model = check_peft_model(model)
    config: Any = model.peft_config[adapter_name or model.active_adapter]
    setting = adapter_text_setting(model, adapter_name or model.active_adapter)
    text = find_towers(unwrap(model)).get("text") if reads_text(model) else None
    names_as_text = text is not None and text.reading is not None
    task = "image-feature-extraction"
    if names_as_text:
        task = "zero-shot-image-classification"
    elif classification_head(model) is not None and not isinstance(config, CoPAConfig):
        task = "image-classification"
    return TrainingRecord(
        task=task,
        adapter=describe(config, _OF_EVERY_CONFIG),
        base_model=base_name(model) or config.base_model_name_or_path,
        template=setting.template if names_as_text else None,
        class_rows=setting.rows is not None,
        multi_label=setting.multi_label,
        post_hoc=changes_after_training(config),
        class_texts={name: list(texts) for name, texts in setting.class_texts.items()} if names_as_text else {},
        dtype=str(next(unwrap(model).parameters()).dtype).removeprefix("torch."),
        versions=library_versions(),
    )


def describe_teacher(model: Any) -> str:
    """Return the Hub id of a model, or its class if it has none, and the types of its adapters."""
    base = base_name(model)
    name = base if base and not is_folder(base) else type(unwrap(model)).__name__
    adapters = [type(config).__name__ for config in getattr(model, "peft_config", {}).values()]
    return f"{name}, tuned by {' and '.join(adapters)}" if adapters else name


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    return {"Python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def describe(owner: Any, aside: Container[str] = ()) -> Component:
    """Return an object's class, and the constructor arguments that it kept and that differ from the defaults.

    For classes that belong neither to this package nor to PEFT, only weight and budget are returned: other values may
    be private.
    """
    known = type(owner).__module__.partition(".")[0] in ("peft_ncgeo", "peft")
    parameters = inspect.signature(type(owner)).parameters if known else {}
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name not in aside
    }
    settings = {}
    for name in dict.fromkeys([*defaults, "weight", "budget"]):
        value = _plain(getattr(owner, name, None))
        if name == "weight" and inspect.isroutine(getattr(owner, name, None)):
            value = "a function of the share of training done"
        given = name in defaults or isinstance(value, int | float | str)
        if given and value is not None and value != [] and value != {} and value != defaults.get(name):
            settings[name] = value
    if settings.get("name") == getattr(owner, "default_name", None):
        settings.pop("name", None)
    return Component(type(owner).__name__, settings)


def describe_arguments(args: Any) -> tuple[dict[str, Any], int]:
    """Return the arguments that differ from the defaults, then those of `_ALWAYS`; and how many differ."""
    values, changed = {}, []
    for entry in fields(args):
        default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
        value, default = _plain(getattr(args, entry.name)), _plain(default)
        if _ASIDE.match(entry.name) or value is None:
            continue
        values[entry.name] = value
        if value != default and (value or default):  # None, False and 0 mean the same
            changed.append(entry.name)
    kept = [name for name in _ALWAYS if name in values and name not in changed]
    return {name: values[name] for name in (*changed, *kept)}, len(changed)


def _plain(value: Any) -> Any:
    """Return numbers, strings, and lists and dicts of them, as JSON stores them; None for paths and other values."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if any(part is None for part in parts) else parts
    if isinstance(value, dict):
        values = {str(key): _plain(part) for key, part in value.items()}
        return None if any(part is None for part in values.values()) else values
    if isinstance(value, str) and ("://" in value or os.path.isabs(value) or value.startswith("~")):
        return None
    return value if isinstance(value, bool | int | float | str) else None


def drawable(snapshots: list[Any]) -> Any:
    """Return means and weights before and after training; None if they are missing or cannot be drawn together."""
    shapes = [[getattr(tensor, "shape", None) for tensor in moment] for moment in snapshots]
    whole = len(snapshots) == 2 and all(means is not None and means == weights for means, weights in shapes)
    same_classes = whole and len(snapshots[0][0]) == len(snapshots[1][0])
    return tuple(snapshots) if same_classes else None
