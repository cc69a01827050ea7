"""`GeometryTrainingArguments`: Transformers' arguments with the defaults that these methods need."""

from __future__ import annotations

import atexit
import gc
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..validation import flag, shown, whole_number

# argument and variable of `accelerate launch` that ask for it
SHARDED = {
    "FSDP": ("fsdp", "ACCELERATE_USE_FSDP"),
    "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED"),
    "Megatron-LM": ("", "ACCELERATE_USE_MEGATRON_LM"),
    "parallelism_config": ("parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG"),
}


def _end_process_group() -> None:
    """End the process group at exit: its threads may need Python once more, and would abort a process without it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # its threads end with the last reference; wrapped models that nobody uses still hold one


@dataclass
class GeometryTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] for [`GeometryTrainer`].

    Defaults that differ: no gradient clipping (`max_grad_norm=0`, as in the papers), NaN losses are never hidden
    (`logging_nan_inf_filter=False`), columns are kept, DDP looks for no unused parameters, callbacks resume with their
    states, and a machine without an accelerator uses its CPU. `optim="sgd"` has momentum only where `optim_args` says
    so. `dataloader_drop_last` holds for training alone: every image is evaluated.

    Args:
        image_column: column of the data sets that holds images.
        label_column: column that holds labels, a `ClassLabel`.
        template: text around a class name. Default: the adapter's own, else "a photo of a {}."; an adapter that
            stores another one is an error.
        frozen_templates: texts that the frozen teacher reads, averaged per class. Default: the template.
        student_templates: texts that losses on several texts a class read, through the tuned model
            (`GeometryBatch.template_features`), its prompts in front of all words. Default: the template alone, whose
            first words the prompts replace.
        class_balanced_sampling: draw classes evenly, with replacement inside a class; an epoch is as long as before.
        augmentation: "none", or "crop_flip": a random crop of 8 to 100 % of the area and a horizontal flip, as CoOp
            trains. Drawn from seed, epoch and sample alone, so processes and resumed runs see the same views.
        num_views: views of each image that augmentation draws, taken in turn; 0: another one in every epoch. Features
            that stay as they are (the frozen model's, and a tuned CLIP's whose image tower is not trained) are then
            computed once a view, as they are without augmentation.
        restore_callback_states_from_checkpoint: resume with the patience of early stopping, say, as it was saved; it
            counts for more than what the callback is made with now.
    """

    image_column: str = field(default="image", metadata={"help": "Column that holds images."})
    label_column: str = field(default="label", metadata={"help": "ClassLabel column that holds labels."})
    template: str | None = field(default=None, metadata={"help": "Text around a class name. Default: the adapter's."})
    frozen_templates: list[str] | None = field(
        default=None, metadata={"help": "Texts that the frozen teacher reads. Default: the template."}
    )
    student_templates: list[str] | None = field(
        default=None, metadata={"help": "Texts of each class for losses that read several. Default: the template."}
    )
    class_balanced_sampling: bool = field(default=False, metadata={"help": "Draw every class equally often."})
    augmentation: str = field(default="none", metadata={"help": "'none' or 'crop_flip'."})
    num_views: int = field(default=0, metadata={"help": "Views that augmentation draws of an image; 0: no end."})

    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys of the inputs that are labels."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0: none, as in the papers."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and Inf losses in the log."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume with the patience of early stopping, say, as it was."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Passed to DDP."})

    def share_batch(self, size: int) -> None:
        """Set the batch of each process so that all of them together see `size` training images a step.

        Raises:
            ValueError: `size` cannot be shared evenly.
        """
        self.per_device_train_batch_size, left = divmod(size, self.world_size)
        if left or not self.per_device_train_batch_size:
            raise ValueError(f"batch_size={size} cannot be shared by {self.world_size} processes.")

    def _refuse_shards(self) -> None:
        for name, (argument, variable) in SHARDED.items():
            if getattr(self, argument, None) or os.environ.get(variable, "").lower() in ("1", "true", "yes"):
                raise ValueError(
                    f"{name} is not supported: losses and callbacks need whole gradients and weights; train on "
                    "several processes with examples/accelerate/gpu_multi.yaml."
                )

    def __post_init__(self) -> None:
        self._refuse_shards()  # before Transformers asks for packages that would not help
        # Must precede super(): a first state built for another device leaves each of two processes alone.
        if not (torch.accelerator.is_available() and torch.accelerator.device_count()):
            self.use_cpu = True
        super().__post_init__()
        if self.world_size > 1:
            atexit.unregister(_end_process_group)  # once, and before all that was registered until now
            atexit.register(_end_process_group)
        if self.augmentation not in ("none", "crop_flip"):
            raise ValueError(f"augmentation={shown(self.augmentation)} must be 'none' or 'crop_flip'.")
        self.num_views = whole_number("num_views", self.num_views, least=0)
        self.class_balanced_sampling = flag("class_balanced_sampling", self.class_balanced_sampling)
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and self.world_size == 1:
            raise RuntimeError(
                f"{started} processes were started but each sees itself alone: create the arguments before any "
                "Accelerator or PartialState, and launch with distributed_type MULTI_GPU and use_cpu (see "
                "examples/accelerate/cpu_2proc.yaml)."
            )
