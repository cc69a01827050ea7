"""Checkpoints that survive an interruption: complete ones are recognised, and resuming is exact."""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...data.head_names import CLASS_NAMES, same_names
from ...files import is_of_writing, read_json, writing
from ...validation import one_line, short_repr
from ..sharing import SharingTrainer
from .files import FILE_NAME, load_state, save_state
from .lost_process import agree, saying_who_is_lost
from .retry import TrainingSnapshot


def why_not_resumable(folder: str | Path) -> str:
    """Return the reason why training cannot resume from this checkpoint; an empty text for a complete one.

    `trainer_state.json` is written last, after every process has written its own file. The other files are checked
    too, because a copied folder may be incomplete.
    """
    folder = Path(folder)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
        random_states = list(folder.glob("rng_state*.pth"))  # one for each process of this machine
        for path in (folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME, *random_states):
            ZipFile(path).close()  # a ZIP file ends with its table of contents
        adapters = [path for at in ("", "[!.]*/") for path in folder.glob(f"{at}adapter_model.safetensors")]
        for path in adapters:
            json.loads(path.with_name("adapter_config.json").read_text())
        for path in (folder / FILE_NAME, *adapters):
            safe_open(path, "pt").__exit__(None, None, None)  # its header holds the length of the file
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename or FILE_NAME).name}, as with save_only_model=True"
    except (OSError, ValueError, RecursionError, BadZipFile, SafetensorError) as error:
        return one_line(error)
    missing = [name for name, found in (("rng_state.pth", random_states), ("adapter", adapters)) if not found]
    return f"it has no {missing[0]}" if missing else ""


def check_classes(folder: str | Path, names: Sequence[str]) -> None:
    """Check that the head in a checkpoint was trained on these classes, in this order.

    Raises:
        ValueError: the head was trained on other classes, or in another order.
    """
    file = Path(folder) / CLASS_NAMES
    known = list(map(str, read_json(file))) if names and file.is_file() else list(names)
    if not same_names(names, known):
        raise ValueError(
            f"Cannot resume from {folder}: its head was trained on the classes {short_repr(known)}, but the training "
            f"set has {short_repr(list(names))}; use the training set of that run, or start a new training."
        )


def check_whole(paths: Iterable[Path]) -> None:
    """Raise an error for truncated torch files; torch 2.6 reports no error when it writes small ones."""
    for path in paths:
        # sharded trainings write other files; a device such as /dev/full would be read without end
        if path.exists() and not (path.is_file() and is_zipfile(path)):
            raise OSError(errno.ENOSPC, f"{path.name} was cut short; is the disk full?")


def last_resumable(output_dir: str | Path) -> str:
    """Return the latest checkpoint from which training can resume; warn if later ones are damaged.

    Raises:
        ValueError: there is none; the message gives the reason.
    """
    names = [path.name for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = [int(found[1]) for name in names if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", name))]
    flaws = {}
    for step in sorted(steps, reverse=True):
        path = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        flaws[path.name] = why_not_resumable(path)
        if not flaws[path.name]:
            break
    broken = ", ".join(f"{name} ({what})" for name, what in flaws.items() if what)
    if "" not in flaws.values():
        raise ValueError(
            f"No valid checkpoint in {output_dir} to resume from{': ' if broken else ''}{broken}. Leave out "
            "resume_from_checkpoint to start from the beginning."
        )
    if broken:
        warnings.warn(f"Incomplete and left aside: {broken}. Training goes on from {path.name}.", stacklevel=3)
    return str(path)


class CheckpointingTrainer(SharingTrainer):
    """Transformers' Trainer whose checkpoints hold the full state of losses and callbacks.

    A training that is stopped at any time resumes from its last complete checkpoint (`resume_from_checkpoint=True`)
    and reaches the same weights. A checkpoint that cannot be written leaves the earlier ones unchanged.
    """

    losses: list[Any]
    class_names: list[str]
    class_means: Any = None
    teacher: Any = None
    _start: TrainingSnapshot | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = agree(lambda: last_resumable(str(self.args.output_dir)))
        elif resume_from_checkpoint and (problem := why_not_resumable(resume_from_checkpoint)):
            raise ValueError(f"Cannot resume from {resume_from_checkpoint}: {problem}.")
        if resume_from_checkpoint:
            check_classes(resume_from_checkpoint, self.class_names)
        try:
            with saying_who_is_lost(lambda: self.state, lambda: last_resumable(str(self.args.output_dir))):
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._start = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self._start is not None:  # an earlier try ran out of memory
            self.optimizer, self.lr_scheduler = self._start.restore()
        elif self.args.auto_find_batch_size:
            model: Any = self.model
            self._start = TrainingSnapshot(model, self._stateful(), self.optimizer, self.lr_scheduler)
        return super()._inner_training_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with nullcontext() if _internal_call else writing(output_dir or str(self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # an earlier training's file would mark this checkpoint as complete too soon
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_of_writing(error) or self.args.save_only_model or not why_not_resumable(folder):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written ({one_line(error)}); the checkpoints before it are intact."
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            check_whole(Path(output_dir, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
            save_state(self._stateful(), output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # trainer_state.json comes next
        check_whole(Path(output_dir).glob("rng_state*.pth"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self._stateful(), checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        peft: Any = self.model if model is None else model
        name, adapters = "default", getattr(peft, "peft_config", {})
        # Transformers 5.18 leaves it out if others lie in folders beside it, and training would start it anew
        if name in adapters and len(adapters) > 1 and Path(resume_from_checkpoint, CONFIG_NAME).is_file():
            peft.load_adapter(resume_from_checkpoint, name, is_trainable=name in peft.active_adapters)

    def _load_best_model(self) -> None:
        adapters = getattr(self.model, "peft_config", {})
        if not adapters or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        model: Any = self.model
        for name in adapters:  # Transformers would load "default" alone, into the active adapter
            folder = Path(str(self.state.best_model_checkpoint)) / (name if name != "default" else "")
            if (folder / CONFIG_NAME).is_file():
                model.load_adapter(str(folder), name, is_trainable=name in model.active_adapters)

    def _stateful(self) -> list[Any]:
        """Return all objects that have a name and a state: losses, class means, a teacher and some callbacks."""
        others = [self.class_means, self.teacher, *self.callback_handler.callbacks]
        owners = [*self.losses, *(o for o in others if hasattr(o, "name") and hasattr(o, "load_state_dict"))]
        for name, count in Counter(owner.name for owner in owners).items():
            if count > 1:
                raise ValueError(
                    f"{count} losses or callbacks have the name {name!r} and would share a state; rename one."
                )
        return owners
