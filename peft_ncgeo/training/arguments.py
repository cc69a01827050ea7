"""`GeometryTrainingArguments`: Transformers' arguments with the defaults that geometric losses need."""

from __future__ import annotations

import atexit
import gc
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.crops import check_num_test_views
from ..validation import check_bool, check_float, check_int, short_repr

# the argument and the variable of `accelerate launch` that turn it on
SHARDED = {
    "FSDP": ("fsdp", "ACCELERATE_USE_FSDP"),
    "DeepSpeed": ("deepspeed", "ACCELERATE_USE_DEEPSPEED"),
    "Megatron-LM": ("", "ACCELERATE_USE_MEGATRON_LM"),
    "parallelism_config": ("parallelism_config", "ACCELERATE_USE_PARALLELISM_CONFIG"),
}


def _end_process_group() -> None:
    """End the process group at exit while Python still runs, since its threads would later abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # its threads end with the last reference, which unused wrapped models still hold


@dataclass
class GeometryTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] for [`GeometryTrainer`].

    Defaults that differ from Transformers': gradients are not clipped (`max_grad_norm=0`, as in the papers), NaN
    losses are never hidden (`logging_nan_inf_filter=False`), columns are kept, DDP neither searches for
    unused parameters nor broadcasts buffers, callbacks resume with their saved states, and a machine without an
    accelerator uses its CPU. `optim="sgd"` has momentum only if `optim_args` sets it. `dataloader_drop_last` holds for
    training only: every image is evaluated.

    Args:
        image_column: column of the data sets that holds images.
        label_column: column that holds labels: a `ClassLabel`, or lists of labels for
            [`~peft_ncgeo.losses.MultiLabelLoss`].
        template: text around a class name. Default: the adapter's own, else "a photo of a {}.". If the adapter has
            prompts, another template than that of its config is an error.
        frozen_templates: texts that the frozen teacher reads, averaged for each class. Default: the template.
        student_templates: texts that the tuned model reads for losses on several texts of a class
            (`GeometryBatch.template_features`), with its prompts before all words. Default: only the template, whose
            first words the prompts replace.
        logit_bias: bias added to the logits of a dual encoder without a bias of its own, such as CLIP, under
            [`~peft_ncgeo.losses.MultiLabelLoss`]; it is saved with the adapter, and not trained. Default: the
            adapter's own, else the bias with which the frozen model's mean probability equals the share of ones among
            the training labels (as Lin et al., arXiv 1708.02002, set the bias of a detector to a prior), measured on
            up to 512 training images and rounded to two decimals. It does not change a softmax over classes.
        class_balanced_sampling: True: draw all classes equally often, with replacement inside a class; the length of
            an epoch does not change.
        augmentation: "none", or "crop_flip": a random crop of 8 to 100 % of the area and a horizontal flip, as in
            CoOp. It depends on seed, epoch and sample only, so processes and resumed runs see the same views.
        num_views: number of fixed views of each image that augmentation draws, used in turn; 0: a new view in every
            epoch. With fixed views, features that do not change (the frozen model's, and those of a tuned CLIP whose
            image tower is not trained) are computed once for each view; without augmentation, once for each image.
        text_batch_size: approximate number of class texts that are encoded at a time. Their activations are computed a
            second time in the backward pass, so that memory grows with the number of classes only by their features;
            the text tower takes about 50 % more time. Default: all texts up to 4,096 tokens, else about 1,024
            tokens.
        num_test_views: number of views of each image in evaluation and prediction: 1, the image itself, or 5, crops of
            the corners and the centre of the image resized to 248 / 224 of the model's size, as in LIFT. Logits are
            the mean over the views, and so are the features for the geometry. Five views take five times as long.
        model_init_kwargs: options of `from_pretrained`, such as `revision` and `dtype`, for a model that the trainer
            loads by its name; given as JSON on the command line.
        restore_callback_states_from_checkpoint: resume callbacks with their saved state, such as the patience of early
            stopping; the saved state overrides the arguments of the new callback.

    Raises:
        TypeError: a number is of another type.
        ValueError: a value is out of range, or sharded training (FSDP, DeepSpeed and others) is asked for.
        RuntimeError: several processes were started, but each sees itself alone.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012  as Transformers'

    image_column: str = field(default="image", metadata={"help": "Column that holds images."})
    label_column: str = field(default="label", metadata={"help": "ClassLabel column that holds labels."})
    template: str | None = field(default=None, metadata={"help": "Text around a class name. Default: the adapter's."})
    frozen_templates: list[str] | None = field(
        default=None, metadata={"help": "Texts that the frozen teacher reads. Default: the template."}
    )
    student_templates: list[str] | None = field(
        default=None,
        metadata={"help": "Texts of each class, for losses that read several texts. Default: the template."},
    )
    logit_bias: float | None = field(
        default=None, metadata={"help": "Bias added to CLIP's logits under MultiLabelLoss. Default: measured."}
    )
    class_balanced_sampling: bool = field(default=False, metadata={"help": "Draw every class equally often."})
    augmentation: str = field(default="none", metadata={"help": "'none' or 'crop_flip'."})
    num_views: int = field(
        default=0, metadata={"help": "Number of views of each image that augmentation draws; 0: a new one each epoch."}
    )
    text_batch_size: int | None = field(
        default=None,
        metadata={"help": "Number of class texts that are encoded at a time. Default: by their number of tokens."},
    )
    num_test_views: int = field(
        default=1, metadata={"help": "Number of test views of each image, whose logits are averaged: 1 or 5."}
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of from_pretrained for a model given by its name, as JSON."}
    )

    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns the model does not name."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys of the inputs that are labels."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0: none, as in the papers."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and Inf losses in the log."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Resume callbacks with their saved state."}
    )
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Passed to DDP."})
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Passed to DDP."})

    def share_batch(self, size: int) -> None:
        """Set the batch size of each process so that all processes together see `size` training images in a step.

        Raises:
            ValueError: `size` is not a multiple of the number of processes.
        """
        self.per_device_train_batch_size, left = divmod(size, self.world_size)
        if left or not self.per_device_train_batch_size:
            raise ValueError(
                f"batch_size={size} cannot be shared by {self.world_size} processes; use a multiple of "
                f"{self.world_size}."
            )

    def _refuse_shards(self) -> None:  # arguments without effect are refused in `checks`, which knows the trainer
        for name, (argument, variable) in SHARDED.items():
            if getattr(self, argument, None) or os.environ.get(variable, "").lower() in ("1", "true", "yes"):
                raise ValueError(
                    f"{name} is not supported: losses and callbacks need whole gradients and weights; train on "
                    "several processes with examples/accelerate/gpu_multi.yaml."
                )

    def _start_process_group(self) -> None:
        """Start the process group of CPUs with `ddp_timeout`, which Transformers passes on only for accelerators."""
        on_cpu = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        started = int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()
        if on_cpu and started and self.ddp_backend in (None, "gloo") and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=self.ddp_timeout))

    def __post_init__(self) -> None:
        self._refuse_shards()  # before Transformers asks for packages that do not help here
        # Must precede super(): if the first state is built for another device, each of two processes runs alone.
        if not (torch.accelerator.is_available() and torch.accelerator.device_count()):
            self.use_cpu = True
        self._start_process_group()
        super().__post_init__()
        if self.world_size > 1:
            atexit.unregister(_end_process_group)  # once, and before everything registered until now
            atexit.register(_end_process_group)
        if self.augmentation not in ("none", "crop_flip"):
            raise ValueError(f"augmentation={short_repr(self.augmentation)} must be 'none' or 'crop_flip'.")
        self.num_views = check_int("num_views", self.num_views, least=0)
        if self.text_batch_size is not None:
            self.text_batch_size = check_int("text_batch_size", self.text_batch_size, least=1)
        self.num_test_views = check_num_test_views(self.num_test_views)
        if self.logit_bias is not None:
            self.logit_bias = check_float("logit_bias", self.logit_bias)
        self.class_balanced_sampling = check_bool("class_balanced_sampling", self.class_balanced_sampling)
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and self.world_size == 1:
            raise RuntimeError(
                f"{started} processes were started but each sees itself alone: create the arguments before any "
                "Accelerator or PartialState, and launch with distributed_type MULTI_GPU and use_cpu (see "
                "examples/accelerate/cpu_2proc.yaml)."
            )
