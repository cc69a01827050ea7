"""Uses of trained models: zero-shot classification, alignment, pipelines."""

from __future__ import annotations

import tempfile

import torch
import transformers as T
from peft import get_peft_model

from peft_ncgeo import (
    NPTConfig,
    ZeroShotClassifier,
)
from peft_ncgeo.data import class_prompts
from peft_ncgeo.training import align_classifier

from .inputs import (
    NAMES,
    TEMPLATE,
    NotApplicable,
    dataset,
    image_processor_for,
    own_logits,
    processor_for,
    require,
    tokenizer_for,
)
from .specs import K
from .training import reference_logits, with_lora


def shake(model):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n or "ncgeo_npt" in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model.eval()


def zero_shot_lora(spec):
    model = shake(with_lora(spec)[0])
    ds = dataset(8)
    got = ZeroShotClassifier(model, processor_for(spec)).predict_proba(ds["image"][:], NAMES)
    own = reference_logits(spec, model, ds).softmax(-1)
    require(
        torch.allclose(got, own, atol=1e-3),
        f"probabilities differ from the model's own by {float((got - own).abs().max()):.3g}",
    )
    return ""


def zero_shot_prompts(spec):
    model = shake(
        get_peft_model(spec.build(), NPTConfig(num_text_tokens=2, text_depth=2, num_vision_tokens=2, vision_depth=2))
    )
    ds = dataset(8)
    got = ZeroShotClassifier(model, processor_for(spec)).predict_proba(ds["image"][:], NAMES)
    t = dict(class_prompts(NAMES, TEMPLATE, 2, tokenizer_for(spec.tok, spec.max_length), model=model))
    x = dict(image_processor_for(spec)(images=ds["image"][:], return_tensors="pt"))
    with torch.no_grad():
        own = model(**x, **t).logits_per_image.softmax(-1)
    gap = f"{float((got - own).abs().max()):.3g}"
    require(torch.allclose(got, own, atol=1e-3), f"probabilities differ from the model's own (unpacked) by {gap}")
    return ""


def align(spec):
    spec.build()
    ds = dataset()
    for what in ("plain", "lora"):
        model = spec.build()
        if what == "lora":
            model = shake(with_lora(spec)[0])
        if not own_logits(spec) or spec.video:
            align_classifier(model, ds, 0.7, processor_for(spec))
            continue
        before = reference_logits(spec, model, ds)
        labels = torch.tensor(ds["label"])
        aligned = align_classifier(model, ds, 0.7, processor_for(spec))
        require(
            abs(aligned.accuracy_before - float((before.argmax(-1) == labels).float().mean())) < 1e-6,
            f"{what}: accuracy_before {aligned.accuracy_before} is not the model's own",
        )
        after = reference_logits(spec, model, ds)
        if spec.kind == "dual":
            require(torch.equal(before, after), "the model was changed")
        else:
            require(not torch.allclose(before, after, atol=1e-4), f"{what}: head unchanged")
            require(
                abs(aligned.accuracy_after - float((after.argmax(-1) == labels).float().mean())) < 1e-6,
                f"{what}: accuracy_after {aligned.accuracy_after} is not the model's own",
            )
            require(aligned.cosine_after > aligned.cosine_before, f"{what}: cosine fell")
            aligned.undo()
            require(torch.equal(reference_logits(spec, model, ds), before), f"{what}: undo does not undo")
    return ""


def pipe(spec, config):
    if spec.video or not own_logits(spec):
        raise NotApplicable("the class takes no single images and texts in such a pipeline")
    task = "zero-shot-image-classification" if spec.kind == "dual" else "image-classification"
    with tempfile.TemporaryDirectory() as root:
        base_dir, folder = f"{root}/base", f"{root}/adapter"
        base = spec.build()
        if spec.kind == "classifier":
            base.config.id2label = dict(enumerate(NAMES))
            base.config.label2id = {n: i for i, n in enumerate(NAMES)}
        base.save_pretrained(base_dir)
        reread = type(base).from_pretrained(base_dir).eval()
        model = shake(with_lora(spec, reread)[0] if config is None else get_peft_model(reread, config(spec, reread)))
        model.save_pretrained(folder)
        proc = processor_for(spec)
        proc.save_pretrained(folder)
        proc.save_pretrained(base_dir)
        kw = {"image_processor": image_processor_for(spec)}
        if spec.kind == "dual":
            kw["tokenizer"] = tokenizer_for(spec.tok, spec.max_length)
        run = T.pipeline(task, model=folder, **kw)
        ds = dataset(4)
        images = ds["image"][:]
        if spec.kind == "classifier":
            got = run(images, top_k=K)
            own = reference_logits(spec, model, ds).softmax(-1)
            for row, mine in zip(got, own, strict=False):
                for entry in row:
                    require(
                        abs(entry["score"] - float(mine[NAMES.index(entry["label"])])) < 1e-3,
                        "scores differ from the model's own",
                    )
            return ""
        got = run(images, candidate_labels=NAMES, hypothesis_template=TEMPLATE)
        table = torch.tensor([[next(e["score"] for e in row if e["label"] == n) for n in NAMES] for row in got])
        own = reference_logits(spec, model, ds)
        own = own.sigmoid() if "iglip" in spec.name else own.softmax(-1)
        require(
            torch.allclose(table, own, atol=1e-3),
            f"scores differ from the model's own by {float((table - own).abs().max()):.3g}",
        )
        return ""


def pipe_lora(spec):
    return pipe(spec, None)


def pipe_prompts(spec):
    return pipe(
        spec,
        lambda s, m: (
            NPTConfig(num_text_tokens=2, text_depth=2, num_vision_tokens=2, vision_depth=2)
            if s.kind == "dual"
            else NPTConfig(num_vision_tokens=2, vision_depth=2)
        ),
    )
