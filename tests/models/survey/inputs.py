"""Images, texts and processors for a model, and what it makes of them."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
import transformers as T
from datasets import ClassLabel, Dataset, Features, Image
from peft import PeftModel
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from peft_ncgeo.data import class_prompts
from peft_ncgeo.models.adapters import unwrap

from ...conftest import WORDS
from .specs import K

TOL = 2e-4
NAMES = ["red cat", "blue dog", "green bird panda", "black fish", "white panda"]
TEMPLATE = "a photo of a {}."

HEADS = {
    "HGNetV2": "fc",
    "TextNet": "fc",
    "SwiftFormer": "head",
    "ImageGPT": "score",
    "TimmWrapper (timm ViT)": "timm_model.head",
    "TimmWrapper (timm ResNet)": "timm_model.fc",
    "TimmWrapper (timm MobileNetV3": "timm_model.classifier",
}


def head_name(spec, model):
    for part, name in HEADS.items():
        if spec.name.startswith(part):
            return name
    return "classifier" if hasattr(model, "classifier") else None


def own_logits(spec):
    """Return True if the class's own forward gives logits for N images and K texts."""
    return not any(
        spec.name.startswith(n)
        for n in ("Flava", "XCLIP", "VideoPrism", "BlipFor", "Blip2", "CLIPSegFor", "ImageGPT", "PPLCNet")
    )


class NotApplicable(Exception):  # noqa: N818
    """The model has no such thing."""


class Wrong(Exception):  # noqa: N818
    """The library ran and its result is not what it should be."""


def tokenizer_for(style, length):
    ids = {w: 5 + i for i, w in enumerate(WORDS)}
    ids |= {f"w{i}": i for i in range(5 + len(WORDS), 60)}
    if style == "clip":
        sp = {"!": 0, "<unk>": 3, "<bos>": 61, "<eos>": 62}
        kw = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
        single = "<bos> $A <eos>"
    elif style == "xlmr":
        sp = {"<bos>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3}
        kw = {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "cls_token": "<bos>",
            "sep_token": "<eos>",
        }
        single = "<bos> $A <eos>"
    elif style == "bert":
        sp = {"[PAD]": 0, "[UNK]": 3, "[CLS]": 60, "[SEP]": 61}
        kw = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        single = "[CLS] $A [SEP]"
    elif style == "siglip":
        sp = {"<eos>": 1, "<unk>": 2}
        kw = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>", "model_input_names": ["input_ids"]}
        single = "$A <eos>"
    else:
        sp = {"<pad>": 0, "<unk>": 3}
        kw = {"pad_token": "<pad>", "unk_token": "<unk>"}
        single = None
    vocabulary = {**sp, **ids}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token=kw["unk_token"]))
    tok.normalizer = normalizers.Lowercase()
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    if single:
        tok.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(w, vocabulary[w]) for w in single.split() if w in sp]
        )
    return T.PreTrainedTokenizerFast(tokenizer_object=tok, model_max_length=length, **kw)


def image_processor_for(spec):
    if "iglip2" in spec.name:
        return T.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    size = {"height": spec.size, "width": spec.size}
    if spec.kind == "dual":
        return T.CLIPImageProcessor(size=size, crop_size=size)
    return T.ViTImageProcessor(size=size)


def processor_for(spec):
    if spec.kind != "dual":
        return image_processor_for(spec)
    tok = tokenizer_for(spec.tok, spec.max_length)
    if "iglip2" in spec.name:
        return T.CLIPProcessor(image_processor_for(spec), tok)
    return T.CLIPProcessor(image_processor_for(spec), tok)


def dataset(count=15, seed=0):
    rng = np.random.default_rng(seed)
    labels = [i % K for i in range(count)]
    arrays = [rng.integers(0, 120, (40, 40, 3)) + 135 * (np.arange(3) == label % 3) for label in labels]
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(a.astype(np.uint8)) for a in arrays], "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(names=NAMES)}),
    )


def image_inputs(spec, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    if "iglip2" in spec.name:
        return {
            "pixel_values": torch.randn(batch, 16, 192, generator=g),
            "pixel_attention_mask": torch.ones(batch, 16, dtype=torch.long),
            "spatial_shapes": torch.full((batch, 2), 4),
        }
    if "ImageGPT" in spec.name:
        return {"input_ids": torch.randint(0, 16, (batch, 64), generator=g)}
    shape = (batch, spec.video, 3, spec.size, spec.size) if spec.video else (batch, 3, spec.size, spec.size)
    return {"pixel_values": torch.randn(shape, generator=g)}


def text_inputs(spec, names=NAMES, slots=0):
    tok = tokenizer_for(spec.tok, spec.max_length)
    try:
        return dict(class_prompts(names, TEMPLATE, slots, tok, max_length=spec.max_length))
    except Exception:
        return dict(tok([TEMPLATE.replace("{}", n) for n in names], padding=True, return_tensors="pt"))


def tensors(out):
    if torch.is_tensor(out):
        return [out]
    if isinstance(out, (list, tuple)):
        return [t for o in out for t in tensors(o)]
    if hasattr(out, "values"):
        return [t for o in out.values() for t in tensors(o)]
    return []


def image_out(spec, model, x=None):
    """All tensors that come out for images; of a dual encoder its image features."""
    x = image_inputs(spec) if x is None else x
    base = unwrap(model)
    if spec.kind == "dual":
        if spec.name.startswith("BlipForImageTextRetrieval"):
            t = text_inputs(spec, NAMES[:3])
            return [model(**x, **{k: v for k, v in t.items() if k != "token_type_ids"}, use_itm_head=False)[0]]
        if spec.name.startswith("Blip2"):
            t = text_inputs(spec, NAMES[:3])
            return [
                model(
                    **x, **{k: v for k, v in t.items() if k != "token_type_ids"}, use_image_text_matching_head=False
                ).logits_per_image
            ]
        if spec.name.startswith("CLIPSegForImage"):
            return [model(**x, **text_inputs(spec, NAMES[:3])).logits]
        run = getattr(base, "get_image_features", None) or base.get_video_features
        if "VideoPrism" in spec.name:
            x = {"pixel_values_videos": x["pixel_values"]}
        out = run(**x)
        return [out.pooler_output if hasattr(out, "pooler_output") else out]
    if own_logits(spec) and spec.kind == "classifier":
        return [model(**x).logits]
    return tensors(model(**x))


def text_out(model, t):
    if not hasattr(unwrap(model), "get_text_features"):
        raise NotApplicable("the class gives no text features of its own")
    out = unwrap(model).get_text_features(**{k: v for k, v in t.items() if k != "token_type_ids"})
    return out.pooler_output if hasattr(out, "pooler_output") else out


def same(a, b, tol=0.0):
    return len(a) == len(b) and all(
        x.shape == y.shape
        and (
            torch.equal(x, y)
            if not tol
            else torch.allclose(x.float(), y.float(), atol=tol * max(1.0, float(y.abs().max())), rtol=0)
        )
        for x, y in zip(a, b, strict=False)
    )


def require(ok, what):
    if not ok:
        raise Wrong(what)


def adapter_params(model):
    return {n: p for n, p in model.named_parameters() if "ncgeo" in n}


def reload_equal(model, spec, out, call):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(spec.build(), folder).eval()
        with torch.no_grad():
            require(same(call(again), out, 1e-6), "loaded adapter gives another output")
