"""One small training run, shared by the tests of the trainer and by the processes they start."""

from __future__ import annotations

import warnings

import torch
from datasets import ClassLabel, Sequence, Value
from peft import LoraConfig, get_peft_model
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Trainer, TrainerCallback, TrainingArguments

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, ImageClassifier, NPTConfig, PrototypeConfig
from peft_ncgeo.losses import (
    ClusterCollapse,
    CrossEntropy,
    GeometricDebiasing,
    LanguageCollapse,
    ModalityIsomorphism,
    OTPreservation,
    PointwisePreservation,
    Regularizer,
    RotationStabilization,
)

from ..conftest import IMAGE_SIZE, NAMES, TEXT, VISION, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier


class Gradients(TrainerCallback):
    """Keeps the gradient of every step, as the optimiser is about to see it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trained = {n: p for n, p in kwargs["model"].named_parameters() if p.requires_grad}
        self.steps.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})


class Pointwise(Regularizer):
    """A term that is a mean over samples, so that it does not care how a batch is cut."""

    default_name = "pointwise"
    requires = ("frozen_image_features",)

    def forward(self, batch):
        return (batch.image_features - batch.frozen_image_features).square().sum(-1).mean()


def prompted_clip(seed: int = 3, **fields):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return get_peft_model(tiny_clip(), NPTConfig.ivlp(text_init=[6, 7, 8, 6], **fields))


def lora_clip():
    torch.manual_seed(3)
    return get_peft_model(tiny_clip(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def vit(config=None):
    torch.manual_seed(3)
    config = config or NPTConfig.vpt(vision_depth=2, modules_to_save=["classifier"])
    return get_peft_model(tiny_vit_classifier(), config)


def larger_clip(seed: int = 5, width: int = 28, image_size: int = IMAGE_SIZE, **overrides):
    """Another CLIP, whose features are wider than the student's."""
    torch.manual_seed(seed)
    text, vision = {**TEXT, "projection_dim": width}, {**VISION, "projection_dim": width, "image_size": image_size}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width, logit_scale_init_value=1.5)
    return CLIPModel._from_config(config, **overrides).eval()


def other_processor():
    """A processor with another normalisation and size (24) of images than the student's."""
    processor, size = tiny_processor(), {"height": 24, "width": 24}
    processor.image_processor = CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]
    )
    return processor


def student_of(teacher, names=NAMES, **options):
    """PromptKD's student: tiny CLIP's image tower with prompts, a projector, and the teacher's texts."""
    given = {"head": "cosine", "init": "texts", "teacher": teacher, "processor": tiny_processor()}
    torch.manual_seed(3)
    base = ImageClassifier.from_backbone(tiny_clip(), names, **{**given, **options})
    config = NPTConfig(num_text_tokens=0, num_vision_tokens=4, vision_depth=3, modules_to_save=["projector"])
    return get_peft_model(base, config)


def prototypes(**fields):
    config = {"projection_dim": 16, "num_vision_tokens": 2, "vision_depth": 2, "prototypes_per_class": 10}
    return vit(PrototypeConfig(**{**config, **fields}))


def lora_vit():
    return vit(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))


def trainer(
    output_dir,
    model=None,
    losses=(),
    train=None,
    eval_dataset=None,
    processor=None,
    classify=True,
    callbacks=(),
    classification_loss=None,
    compute_metrics=None,
    data_collator=None,
    class_names=None,
    class_counts=None,
    class_texts=None,
    teacher=None,
    teacher_processor=None,
    peft_config=None,
    **arguments,
):
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
    }
    return GeometryTrainer(
        model=model or prompted_clip(),
        args=GeometryTrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments}),
        train_dataset=tiny_images(32) if train is None else train,
        eval_dataset=eval_dataset,
        processing_class=processor or tiny_processor(),
        losses=list(losses),
        callbacks=list(callbacks),
        classification_loss=(classification_loss or CrossEntropy()) if classify else None,
        compute_metrics=compute_metrics,
        data_collator=data_collator,
        class_names=class_names,
        class_counts=class_counts,
        class_texts=class_texts,
        teacher=teacher,
        teacher_processor=teacher_processor or (teacher and tiny_processor()),
        peft_config=peft_config,
    )


def transformers_trainer(output_dir, model, images, callbacks=(), **arguments) -> Trainer:
    """Transformers' own Trainer of an image classifier, on the same images in the same order."""
    pixels = tiny_processor().image_processor(images["image"][:], return_tensors="pt")["pixel_values"]
    defaults = {"learning_rate": 0.05, "optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0, "seed": 7}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "label_names": ["labels"]}
    defaults |= {"use_cpu": True, "report_to": "none"}
    return Trainer(
        model=model,
        args=TrainingArguments(str(output_dir), **{**defaults, **arguments}),
        train_dataset=[{"pixel_values": p, "labels": y} for p, y in zip(pixels, images["label"], strict=True)],
        callbacks=list(callbacks),
    )


def several_labels(dataset, as_rows: bool = False):
    """The same images, each with its label, the next class for every second one and no label for every seventh."""
    names = dataset.features["label"].names
    labels = [[] if i % 7 == 6 else sorted({y, (y + i % 2) % len(names)}) for i, y in enumerate(dataset["label"])]
    feature = Sequence(ClassLabel(names=names))
    if as_rows:
        labels = [[int(k in own) for k in range(len(names))] for own in labels]
        feature = Sequence(Value("int64"), length=len(names))
    return dataset.remove_columns("label").add_column("label", labels, feature=feature)


def ot_and_budget() -> list[Regularizer]:
    return [
        OTPreservation(weight=2.0, solver="entropic", epsilon=1.0, memory_size=12),  # a large one ends soon
        OTPreservation(budget=0.01, modality="image", name="ot_image"),
    ]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def whole_family() -> list[Regularizer]:
    return [
        PointwisePreservation(weight=0.5),
        RotationStabilization(budget=0.1),
        LanguageCollapse(weight=0.25),
        GeometricDebiasing(weight=0.25, anchor=True),
        ModalityIsomorphism(weight=0.15, method="sinkhorn"),
        ClusterCollapse(weight=0.25, num_clusters=2),
    ]


def pixels_and_labels(dataset):
    images = [image.convert("RGB") for image in dataset["image"]]
    return tiny_processor().image_processor(images=images, return_tensors="pt")["pixel_values"], dataset["label"][:]
