"""Saving and sharing of trained adapters: files, model cards, the Hub."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..data.head_names import CLASS_NAMES, head_names, write_class_names
from ..data.processors import image_processor
from ..hub.card import create_card
from ..hub.push import check_push, push_adapter
from ..hub.record import TrainingRecord
from ..hub.save import draw_geometry
from ..loading.adapter_folder import writing_adapter
from ..loading.hub_errors import hub_errors
from ..loading.load import PROCESSOR_FILES, PROTOTYPES
from ..loading.text_setting_file import TEXT_FILES, write_text_setting
from ..models.heads import classification_head
from ..models.text_setting import adapter_text_setting
from ..models.towers import reads_text
from .card_record import record_training


class SharingTrainer(Trainer):
    """Transformers' Trainer that saves and pushes adapters with this package's cards, not whole folders.

    Transformers uploads the output folder, including pickled arguments with paths and tokens. Here an upload holds
    only the adapter, the processor and the card.
    """

    _card_options: dict[str, Any] | None = None  # of the last `create_model_card`

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, its processor and a card; checkpoints, which are not shared, hold only the adapter.

        The card has the results of evaluations that were made with the current weights; nothing is measured for it:
        call `evaluate` or `create_model_card` before. Call this on all processes.
        """
        super().save_model(output_dir, _internal_call=True)
        if _internal_call:
            return
        if self.args.should_save:
            self._save_beside(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_beside(self, folder: Path) -> None:
        """Write the processor, and for an adapter also a card, into the folder of the saved model."""
        model: Any = self.model
        if isinstance(model, PeftModel):
            folder = folder if model.active_adapter == "default" else folder / model.active_adapter  # as PEFT does
            if (folder / "config.json").exists():
                warnings.warn(
                    f"{folder} holds a model (config.json), so the processor and the card of the adapter are not "
                    "written there; save the adapter into a folder of its own.",
                    stacklevel=4,
                )
                return
            for name in PROCESSOR_FILES:  # an adapter of another kind may have left them
                (folder / name).unlink(missing_ok=True)
        processor = self.processing_class if reads_text(model) else image_processor(self.processing_class)
        if processor is not None:
            processor.save_pretrained(str(folder))
        if isinstance(model, PeftModel):
            record = record_training(self, known_only=True)
            options = {"repo_id": self._repo_id, **(self._card_options or {})}
            create_card(record=record, figure=draw_geometry(record, folder), **options).save(folder / "README.md")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Of checkpoints: the base model has its processor. A tokenizer beside the adapter makes AutoPeftModel ask
        # CLIPModel for input embeddings, which it does not have.
        folder = Path(output_dir or str(self.args.output_dir))
        processing_class, self.processing_class = self.processing_class, None
        try:
            if self.args.should_save and isinstance(self.model, PeftModel):
                with writing_adapter(folder, [CLASS_NAMES, PROTOTYPES, *TEXT_FILES]) as part:
                    super()._save(str(part), state_dict)
                    self._save_class_names(part)
            else:
                super()._save(output_dir, state_dict)
                self._save_class_names(folder)
        finally:
            self.processing_class = processing_class

    def _save_class_names(self, folder: Path) -> None:
        """Write the class names and an adapter's template; [`~peft_ncgeo.hub.load_adapter`] reads them."""
        model: Any = self.model
        heads = not reads_text(model) and classification_head(model) is not None and head_names(model)
        for name in getattr(model, "peft_config", {}):
            place = folder if name == "default" else folder / name  # as PEFT does
            if (place / CONFIG_NAME).is_file():
                if heads:
                    write_class_names(place, head_names(model))
                write_text_setting(place, adapter_text_setting(model, name))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with hub_errors(f"The repository {self._repo_id} cannot be made"):
            super().init_hf_repo(*args, **kwargs)

    def record(self) -> TrainingRecord:
        """Return the record of this training for a card, with evaluations of every set with the adapter off and on.

        Call this on all processes.
        """
        return record_training(self)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **card: Any,
    ) -> None:
        """Write `README.md`, and a figure of the geometry, into the output folder.

        It also accepts the arguments of [`~peft_ncgeo.hub.create_card`]. `tasks` and `dataset_args` are ignored: the
        task in the card is the model's. Call this on all processes.
        """
        options = _card_options(card, language, license, tags, finetuned_from, dataset_tags, dataset)
        self._card_options = options if model_name is None else {"repo_id": model_name, **options}
        record, folder = self.record(), str(self.args.output_dir)
        if self.is_world_process_zero():
            figure = draw_geometry(record, folder)
            options.setdefault("repo_id", model_name or self._repo_id)
            create_card(record=record, figure=figure, **options).save(f"{folder}/README.md")

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        base_model_id: str | None = None,
        record: TrainingRecord | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Push the active adapter, the processor and a card to `args.hub_model_id`, in one commit.

        Call this on all processes. For the card, the trainer's evaluation sets are evaluated with the adapter off and
        on.

        Args:
            commit_message, token, revision, private: see [`~peft_ncgeo.hub.push_adapter`].
            blocking: must be True, since an adapter is pushed in seconds.
            base_model_id: Hub id of the base model; needed if it was loaded from a folder.
            record: record from `trainer.record()`, to avoid new measurements.
            card: arguments of [`~peft_ncgeo.hub.create_card`], by its names or those of Transformers'
                `create_model_card`.

        Returns:
            The commit; None on all processes except the first.

        Raises:
            TypeError: `card` has an unknown option, or the model is not a `PeftModel`.
            OSError, ValueError: `blocking` is False; or as in [`~peft_ncgeo.hub.push_adapter`].
        """
        if not blocking:
            raise ValueError(
                "blocking=False is not supported; leave it at True, since an adapter is pushed in seconds."
            )
        names = ("language", "license", "tags", "finetuned_from", "dataset_tags", "dataset")
        options = _card_options(card, *(card.pop(name, None) for name in names))
        finetuned_from, model = options.pop("base_model_id", None), self.model
        base_model_id = base_model_id or finetuned_from
        check_push(model, self._repo_id, base_model_id, token or self.args.hub_token)  # before measuring
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        record = self.record() if record is None else record
        if not self.is_world_process_zero():
            return None
        return self._push(
            commit_message=commit_message or "End of training",
            token=token,
            revision=revision,
            private=private,
            base_model_id=base_model_id,
            record=record,
            **options,
        )

    @property
    def _repo_id(self) -> str:
        """Id of the repository, named as in Transformers."""
        args = self.args
        return getattr(self, "hub_model_id", None) or args.hub_model_id or Path(str(args.output_dir)).resolve().name

    def _push(self, token: str | None = None, **options: Any) -> CommitInfo:
        args = self.args
        token = token or args.hub_token
        if options.get("private") is None:
            options["private"] = args.hub_private_repo
        if options.get("revision") is None:
            options["revision"] = args.hub_revision
        model: Any = self.model
        return push_adapter(model, self._repo_id, self.processing_class, token=token, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self._push(commit_message=message, record=record_training(self, measure=False))
        except (OSError, ValueError) as error:  # the next save pushes again
            warnings.warn(str(error), stacklevel=2)

    def _finish_current_push(self) -> None:
        pass  # each push has finished when its call returns


def _card_options(
    card: dict[str, Any], language: Any, license: Any, tags: Any, finetuned_from: Any, dataset_tags: Any, dataset: Any
) -> dict[str, Any]:
    """Return card options by the names of [`create_card`], from options by Transformers' names and from `card`.

    Raises:
        TypeError: `card` has a name that neither of the two functions has.
    """
    known = inspect.signature(create_card).parameters
    for name in card:
        if name not in (*known, "model_name", "tasks", "dataset_args"):
            raise TypeError(f"A card has no option {name!r}; it takes {', '.join(n for n in known if n != 'model')}.")
    options = {
        "language": language,
        "license": license,
        "tags": [tags] if isinstance(tags, str) else tags,
        "base_model_id": finetuned_from,
        "datasets": dataset_tags,
        "dataset_name": dataset[0] if isinstance(dataset, list) and dataset else dataset,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return {**given, **{name: value for name, value in card.items() if name in known}}
