"""Training runs that must not depend on the number of processes, and what each process of a launch does with them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

from peft_ncgeo.data import CutMix
from peft_ncgeo.losses import (
    LDAM,
    CrossEntropy,
    Distillation,
    ModalityIsomorphism,
    OTPreservation,
    PrototypeImageContrast,
    PrototypeSupCon,
    SpaceAlignment,
)
from peft_ncgeo.training import GeometryMonitor, GradientProjection, PromptAveraging, SlerpAlignment
from peft_ncgeo.training.gathering import batch_sizes, gather_batch, step_sizes

from ..cases import FORMULAS, Loss
from ..conftest import NAMES, tiny_clip, tiny_images
from .runs import (
    Gradients,
    Pointwise,
    larger_clip,
    lora_clip,
    lora_vit,
    ot_and_budget,
    other_processor,
    prompted_clip,
    prototypes,
    several_labels,
    student_of,
    trainer,
    vit,
    weights,
)
from .runs import whole_family as family

BATCH = 12  # of all processes: 6 on each of two, 4 on each of three


def images(count: int, names: list[str] = NAMES):
    """The last batch is short: with 3 samples in it, none is left for the last of several processes.

    The first class has one sample, which only one process sees.
    """
    many = tiny_images(2 * count, names)
    kept = [i for i, label in enumerate(many["label"]) if label][: count - 1]
    return many.select([0, *kept])


# ---- whole trainings, in which everything is on ---------------------------------------------------------------------

WHOLE: dict[str, Any] = {
    "prompts": lambda: {"losses": ot_and_budget()},
    "lora": lambda: {"model": lora_clip(), "losses": ot_and_budget()},
    "vit": lambda: {"model": vit(), "losses": [OTPreservation(budget=0.01, modality="image")]},
    # no term looks at the text tower, and DDP must not wait for it
    "image_only": lambda: {"losses": [Pointwise(weight=1.0)], "classify": False},
    "family": lambda: {
        "losses": family(),
        "callbacks": [PromptAveraging(mean=1, std=1), GeometryMonitor()],
        "classification_loss": LDAM(max_margin=0.1),
        "class_balanced_sampling": True,
        "student_templates": ["a photo of a {}.", "a photo of the {}, in black."],
        "frozen_templates": ["a photo of a {}.", "the {}."],
    },
    "aligned": lambda: {
        "model": lora_vit(),
        "losses": [SpaceAlignment(weight=0.5, detach_means=False), PrototypeImageContrast(weight=0.1)],
        "callbacks": [SlerpAlignment(alpha=2e-5), GradientProjection(), GeometryMonitor()],
        "classification_loss": LDAM(max_margin=0.1, reweight_after=0.5),
    },
    "aligned_texts": lambda: {"losses": [SpaceAlignment(weight=0.5)], "callbacks": [GradientProjection()]},
    # text prompts that images depend on too, some of them
    "aligned_coupled": lambda: {
        "model": prompted_clip(
            num_text_tokens=2, num_vision_tokens=2, coupling="coupled", text_depth=3, vision_depth=2
        ),
        "losses": [SpaceAlignment(weight=-1.0)],
        "callbacks": [GradientProjection()],
    },
    "prototypes": lambda: {
        "model": prototypes(trainable=True),
        "losses": [PrototypeSupCon()],
        "classify": False,
    },
    "accumulated": lambda: {
        "losses": [*ot_and_budget(), SpaceAlignment(weight=0.5)],
        "callbacks": [GradientProjection(), PromptAveraging(mean=1, std=1)],
        "gradient_accumulation_steps": 3,  # the last micro-batch is short
    },
    "drop_last": lambda: {"losses": ot_and_budget(), "dataloader_drop_last": True},
    # a batch norm over all processes, and images without labels
    "distilled": lambda: {
        "model": student_of(larger_clip()),
        "teacher": larger_clip(),
        "losses": [Distillation(weight=5.0, temperature=2.0)],
        "classify": False,
        "unlabelled": True,
    },
    "distilled_views": lambda: {  # the teacher's logits known from the start, of pixels of its own
        "teacher": larger_clip(image_size=24),
        "teacher_processor": other_processor(),
        "losses": [Distillation(weight=2.0)],
        "num_views": 1,
    },
    "views": lambda: {  # image features known from the start, shared out to encode
        "model": prompted_clip(num_vision_tokens=0),
        "losses": ot_and_budget(),
        "augmentation": "crop_flip",
        "num_views": 1,
    },
    "mixed": lambda: {  # over all processes, by an adapter that each of them makes
        "model": tiny_clip(),
        "peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "losses": [OTPreservation(budget=0.01, modality="image")],
        "data_collator": CutMix(),
        "gradient_accumulation_steps": 3,
    },
    "crops": lambda: {"model": lora_vit(), "num_test_views": 5, "callbacks": [GeometryMonitor()]},
}

# ---- each loss and each callback alone ------------------------------------------------------------------------------


def alone(**options: Any):
    return lambda: {
        "classify": "classification_loss" in options,
        "num_train_epochs": 1,
        "augmentation": "none",
        **{k: make() for k, make in options.items()},
    }


def loss_alone(loss: Loss):
    """A training by this loss, on a model that has what it reads."""
    options: dict[str, Any] = {"losses": lambda: [loss()]}
    if "multi_hot" in loss.reads:  # evaluated too
        return alone(classification_loss=loss, lists=lambda: True)
    if "teacher_logits" in loss.reads:
        options["teacher"] = larger_clip
    elif "logits" in loss.reads:
        options = {"classification_loss": loss}
    if "template_features" in loss.reads:
        options["student_templates"] = lambda: ["a photo of a {}.", "a photo of the {}, in black."]
    if loss.cls in HEADS:
        options["model"] = HEADS[loss.cls]
    return alone(**options)


HEADS = {PrototypeImageContrast: lora_vit, PrototypeSupCon: prototypes}
# settings that gather nothing which another setting of the same loss does not
LEFT_OUT = {
    *("LDAM(re-weighted)", "MultiLabelLoss(asymmetric, gamma_pos 1, pos_weight 2)"),
    *("OTPreservation(separate, exact)", "OTPreservation(image, exact)", "OTPreservation(joint, epsilon 0.5)"),
    *("PointwisePreservation(mean)", "Distillation(temperature 1)", "GeometricDebiasing(anchor False)"),
    *("ClusterCollapse(default clusters, mean)", "SpaceAlignment(detach True, center True)"),
}
# others: 3 an epoch
STEPS = {"accumulated": 2, "mixed": 2, "drop_last": 4, "stream": 5, "CrossEntropy, accumulated": 1}
MEMORY = {"budget": 0.01, "modality": "separate", "solver": "entropic", "epsilon": 1.0, "memory_size": 9}
ALONE: dict[str, Any] = {
    **{name: loss_alone(loss) for name, loss in FORMULAS.items() if name not in LEFT_OUT},
    "CrossEntropy, accumulated": alone(
        model=lora_vit, classification_loss=CrossEntropy, gradient_accumulation_steps=lambda: 3
    ),
    "Distillation, with a batch norm": alone(
        model=lambda: student_of(larger_clip()),
        teacher=larger_clip,
        losses=lambda: [Distillation(weight=20.0)],
    ),
    "OTPreservation, memory": alone(losses=lambda: [OTPreservation(**MEMORY)]),
    # the last of three processes has no text of its own
    "CrossEntropy, two classes": alone(
        losses=ot_and_budget, classification_loss=CrossEntropy, names=lambda: NAMES[:2]
    ),
    "CrossEntropy, texts in pieces": alone(
        losses=ot_and_budget, classification_loss=CrossEntropy, text_batch_size=lambda: 1
    ),
    "PromptAveraging": alone(classification_loss=CrossEntropy, callbacks=lambda: [PromptAveraging(mean=1, std=1)]),
    "GradientProjection": alone(classification_loss=CrossEntropy, callbacks=lambda: [GradientProjection()]),
    "SlerpAlignment": alone(
        model=lora_vit, classification_loss=CrossEntropy, callbacks=lambda: [SlerpAlignment(alpha=2e-5)]
    ),
    "class texts": alone(
        losses=lambda: [*ot_and_budget(), ModalityIsomorphism(weight=0.5, method="sinkhorn", epsilon=0.5)],
        classification_loss=CrossEntropy,
        class_texts=lambda: {NAMES[1]: ["a dog, blue", "the blue dog of the tree", "blue"]},
        student_templates=lambda: ["a photo of the {}, in black."],
    ),
    # two whole passes and a part of the third
    "stream": alone(losses=ot_and_budget, classification_loss=LDAM, stream=lambda: True, max_steps=lambda: 5),
    "GeometryMonitor": alone(classification_loss=CrossEntropy, callbacks=lambda: [GeometryMonitor()]),
}


def runs_of(world: int) -> dict[str, Any]:
    """Return the runs of `world` processes: two train whole runs, three train every loss and callback alone."""
    return {1: {**WHOLE, **ALONE}, 2: WHOLE, 3: ALONE}[world]


def run(name: str, options: dict[str, Any], output_dir: Path, world: int) -> None:
    gradients = Gradients()
    options["callbacks"] = [*options.get("callbacks", []), gradients]
    names = options.pop("names", NAMES)
    train = images(27, names)
    if options.pop("unlabelled", False):
        train, options["class_names"] = train.remove_columns("label"), NAMES
    lists = several_labels if options.pop("lists", False) else lambda dataset: dataset
    if options.pop("stream", False):
        train, options["class_counts"] = train.to_iterable_dataset(), [1, 6, 7, 7, 6]
    training = trainer(
        output_dir,
        train=lists(train),
        eval_dataset=lists(tiny_images(9, names)),
        per_device_train_batch_size=BATCH // world,
        **{"augmentation": "crop_flip", "num_train_epochs": 2, **options},
    )
    assert training.args.world_size == world, training.args.world_size
    training.train()
    saved = {key: value for key, value in training.model.named_buffers() if ".modules_to_save." in key}
    result: dict[str, Any] = {
        "weights": weights(training.model) | saved,  # and statistics of batch norms
        "gradients": gradients.steps,
        "state": {f"{own.name}.{key}": v for own in training._stateful() for key, v in own.state_dict().items()},
        "factors": [loss.factor() for loss in training.losses],
        "log": [entry for entry in training.state.log_history if "loss" in entry],
    }
    if name in WHOLE or name in ("GeometryMonitor", "MultiLabelLoss()"):
        # Transformers' loss of the last, shorter batch counts as a full one; the rest are speeds
        metrics = training.evaluate().items()
        result["metrics"] = {k: v for k, v in metrics if not k.endswith(("time", "second", "eval_loss"))}
    if name in WHOLE:
        training.save_model()
        result["sets"] = training.record().sets
    if name in ("lora", "vit"):  # texts, and a head
        result["report"] = training.report(validation=tiny_images(13, names, seed=4)).to_dict()
    torch.save(result, output_dir / f"result_{training.args.process_index}.pt")


def run_all(folder: str, world: int) -> None:
    """Every training, in each of the processes."""
    warnings.simplefilter("ignore", UserWarning)
    for name, make in runs_of(world).items():
        torch.manual_seed(0)
        run(name, make(), Path(folder) / name, world)


def gather_uneven(folder: str) -> None:
    """Three rows of one process and two of another: what both have of them, and the gradient of their own."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    rows = torch.arange(10, dtype=torch.float64).reshape(5, 2)
    own = (rows[:3] if rank == 0 else torch.cat([rows[3:], rows[:1]])).clone().requires_grad_()
    labels = torch.tensor([0, 1, 2] if rank == 0 else [3, 4, -100])  # the last row fills up
    sizes = batch_sizes(labels)
    assert step_sizes([labels.clamp_min(0), labels]) == [[3, 3], sizes]
    together = gather_batch(own, sizes)
    # each process computes the same loss of all rows; DDP would then take the mean over processes
    (together @ together.T).pow(2).sum().div(2).backward()
    torch.save((sizes, together.detach(), own.grad), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
