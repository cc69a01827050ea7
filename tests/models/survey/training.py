"""Trainings, and the model's own logits, which the library's must equal."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ncgeo import (
    GeometryTrainer,
    GeometryTrainingArguments,
    NPTConfig,
    PrototypeConfig,
)
from peft_ncgeo.losses import OTPreservation, PrototypeSupCon, SpaceAlignment

from .inputs import (
    NAMES,
    TEMPLATE,
    NotApplicable,
    Wrong,
    dataset,
    head_name,
    image_processor_for,
    own_logits,
    processor_for,
    require,
    tokenizer_for,
)


def lora(spec, model, head=True):
    head_of = {"classifier", head_name(spec, model)}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not head_of & {n, *n.split(".")}]
    names = names or [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and "classifier" not in n
    ]
    if spec.name.startswith("MobileNetV"):
        raise NotApplicable(
            "PEFT's LoRA cannot wrap its convolutions: Transformers' MobileNet reads conv.stride off them"
        )
    keep = [head_name(spec, model)] if head and spec.kind == "classifier" and head_name(spec, model) else None
    return LoraConfig(target_modules=names, r=2, modules_to_save=keep)


def all_linear(spec, model):
    keep = [head_name(spec, model)] if spec.kind == "classifier" and head_name(spec, model) else None
    saved = [n for n, _ in model.named_modules() if keep and n.endswith(keep[0])]  # as PEFT finds them
    return LoraConfig(target_modules="all-linear", exclude_modules=saved, r=2, modules_to_save=keep)


def with_lora(spec, model=None):
    base = spec.build() if model is None else model
    try:
        return get_peft_model(base, all_linear(spec, base)), "all-linear"
    except ValueError as e:
        if "No modules were targeted" not in str(e):
            raise
    base = spec.build() if model is None else model
    return get_peft_model(base, lora(spec, base)), "listed convolutions"


def reference_logits(spec, model, ds, names=NAMES):
    """The model's own logits for these images, by its own forward and the tokenizer's own padding."""
    ip = image_processor_for(spec)
    x = dict(ip(images=[i.convert("RGB") for i in ds["image"][:]], return_tensors="pt"))
    model.eval()
    with torch.no_grad():
        if spec.kind != "dual":
            return model(**x).logits
        tok = tokenizer_for(spec.tok, spec.max_length)
        pad = (
            {"padding": "max_length", "max_length": spec.max_length}
            if spec.tok in ("siglip", "plain")
            else {"padding": True}
        )
        t = dict(tok([TEMPLATE.replace("{}", n) for n in names], return_tensors="pt", **pad))
        t.pop("token_type_ids", None)
        return model(**x, **t).logits_per_image


def trainer_args(folder):
    return GeometryTrainingArguments(
        output_dir=folder,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=5,
        per_device_eval_batch_size=8,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )


def train(spec, config=None, losses=None, **kw):
    torch.manual_seed(0)
    base = spec.build()
    if config is None:
        model, how = with_lora(spec)
    else:
        model = get_peft_model(base, config)
        how = ""
    ds = dataset()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    if losses is None:
        losses = [
            SpaceAlignment(weight=0.1),
            OTPreservation(weight=1.0, **({} if spec.kind == "dual" else {"modality": "image"})),
        ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GeometryTrainer(
            model=model,
            args=trainer_args(folder),
            train_dataset=ds,
            eval_dataset=ds,
            processing_class=processor_for(spec),
            losses=losses,
            **kw,
        )
        trainer.train()
        metrics = trainer.evaluate()
        require(np.isfinite(metrics["eval_loss"]) and 0 <= metrics["eval_accuracy"] <= 1, f"metrics {metrics}")
        moved = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
        require(moved, "nothing was trained")
        still = [n for n in before if n not in moved and "lora_A" not in n]
        predicted = torch.from_numpy(trainer.predict(ds).predictions)
    if own_logits(spec) and (config is None or not getattr(config, "num_text_tokens", 0)):
        own = reference_logits(spec, model, ds)
        if not torch.allclose(own.float(), predicted, atol=1e-3 * max(1, float(own.abs().max()))):
            gap = own - predicted
            constant = float((gap - gap.mean()).abs().max())
            raise Wrong(
                f"trainer's logits differ from the model's own by {float(gap.abs().max()):.3g}"
                + (
                    f", all by {float(gap.mean()):.3g}"
                    if constant < 1e-3
                    else f" (argmax differs in {int((own.argmax(-1) != predicted.argmax(-1)).sum())} of {len(own)})"
                )
            )
    return f"{how}" + (f"; never moved: {len(still)} of {len(before)}, e.g. {still[0]}" if still else "")


def train_prompts(spec):
    text = spec.kind == "dual"
    if text:
        try:
            get_peft_model(spec.build(), NPTConfig(num_text_tokens=2))
        except Exception:
            text = False
    try:
        get_peft_model(spec.build(), NPTConfig(num_vision_tokens=2))
        vision = True
    except Exception:
        vision = False
    if not (text or vision):
        raise NotApplicable("no prompts here (see a)")
    fields = ({"num_text_tokens": 2, "text_depth": 2} if text else {}) | (
        {"num_vision_tokens": 2, "vision_depth": 2} if vision else {}
    )
    if spec.kind == "classifier" and (head := head_name(spec, spec.build())):
        fields["modules_to_save"] = [head]
    return "+".join(k for k, v in (("text", text), ("vision", vision)) if v) + " " + train(spec, NPTConfig(**fields))


def train_ce(spec):
    return train(spec, losses=())


def train_prototypes(spec):
    return train(spec, PrototypeConfig(projection_dim=16), losses=[PrototypeSupCon()], classification_loss=None)
