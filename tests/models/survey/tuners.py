"""Prompts, prototypes, CoPA and AdaptFormer: what comes out, what is trained, and what a file gives back."""

from __future__ import annotations

import torch
from peft import get_peft_model

from peft_ncgeo import (
    AdaptFormerConfig,
    CoPAConfig,
    NPTConfig,
    PrototypeConfig,
    adapt,
)
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.data import class_prompts
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.text_encoder import encode_texts
from peft_ncgeo.models.towers import find_pooling, find_towers

from .inputs import (
    NAMES,
    TEMPLATE,
    TOL,
    NotApplicable,
    Wrong,
    adapter_params,
    dataset,
    image_inputs,
    image_out,
    processor_for,
    reload_equal,
    require,
    same,
    text_out,
    tokenizer_for,
)
from .outcomes import describe


def vision_prompts(spec):
    torch.manual_seed(1)

    def call(m):
        return image_out(spec, m)

    with torch.no_grad():
        base = call(spec.build())
    config = NPTConfig(num_vision_tokens=2, vision_depth=2, init_std=0.5)
    model = get_peft_model(spec.build(), config).eval()
    out = call(model)
    require(
        [o.shape for o in out] == [b.shape for b in base],
        f"output shapes {[tuple(o.shape) for o in out]} instead of {[tuple(b.shape) for b in base]}",
    )
    require(not same(out, base, 1e-4), "output does not change (silent no-op)")
    sum((o.float() ** 2).sum() for o in out if o.is_floating_point()).backward()
    prompts = adapter_params(model)
    require(len(prompts) == 2, f"{len(prompts)} prompts instead of 2")
    for n, p in prompts.items():
        require(p.grad is not None and float(p.grad.abs().max()) > 0, f"no gradient reaches {n}")
    with torch.no_grad():
        out = call(model)
        with model.disable_adapter():
            require(same(call(model), base, 1e-6), "disabled adapter differs from the base model")
        reload_equal(model, spec, out, call)
        for p in prompts.values():
            p.copy_(p.flip(0))
        require(same(call(model), out, TOL), "order of the prompts matters: the tower treats tokens by their place")
        for p in prompts.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
        require(not same(call(model), out, 1e-4), "output does not change with the prompts")
    duplicates(spec)
    note = ""
    try:
        with torch.no_grad():
            x = image_inputs(spec)
            b, m = spec.build(), model
            ob, om = (unwrap(k)(**x, output_hidden_states=True) for k in (b, m))
            hb, hm = ob.hidden_states, om.hidden_states
            if [h.shape for h in hb] != [h.shape for h in hm]:
                note = f"hidden_states lengths {[h.shape[1] for h in hb]} -> {[h.shape[1] for h in hm]}"
    except Exception:
        pass
    return note


@torch.no_grad()
def duplicates(spec):
    """Prompts that repeat all tokens of the one image change nothing in attention over a set.

    Where patches know their place by rotation, as in DINOv3, copies of them at no place are other tokens.
    """
    x = image_inputs(spec, batch=1)
    base = spec.build()
    tower = find_towers(base)["vision"]
    if tower.special_tokens is not None:
        return
    seen = []
    handle = base.get_submodule(tower.embeddings).register_forward_hook(
        lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
    )
    expected = image_out(spec, base, x)
    handle.remove()
    tokens = seen[0]
    if tokens.dim() != 3 or len(tokens) != 1:
        return
    model = get_peft_model(spec.build(), NPTConfig(num_vision_tokens=tokens.shape[1], vision_depth=1)).eval()
    (prompt,) = adapter_params(model).values()
    prompt.copy_(tokens[0])
    got = image_out(spec, model, x)
    require(
        same(got, expected, 1e-3),
        "prompts that repeat the image's own tokens change its output: the tower treats tokens by their place",
    )


def text_prompts(spec):
    torch.manual_seed(1)
    tok = tokenizer_for(spec.tok, spec.max_length)
    model = get_peft_model(spec.build(), NPTConfig(num_text_tokens=2, text_depth=2, init_std=0.5)).eval()
    t = dict(class_prompts(NAMES, TEMPLATE, 2, tok, model=model))
    base_model = spec.build()
    with torch.no_grad():
        base = text_out(base_model, t)
    out = text_out(model, t)
    require(out.shape == base.shape, f"shape {tuple(out.shape)} instead of {tuple(base.shape)}")
    require(not same([out], [base], 1e-4), "output does not change (silent no-op)")
    (out**2).sum().backward()
    prompts = adapter_params(model)
    require(len(prompts) == 2, f"{len(prompts)} prompts instead of 2")
    for n, p in prompts.items():
        require(p.grad is not None and float(p.grad.abs().max()) > 0, f"no gradient reaches {n}")
    with torch.no_grad():
        out = text_out(model, t)
        with model.disable_adapter():
            require(same([text_out(model, t)], [base]), "disabled adapter differs from the base model")
        plain = get_peft_model(spec.build(), NPTConfig(num_text_tokens=2, text_depth=2, pack_text=False)).eval()
        for p, q in zip(prompts.values(), adapter_params(plain).values(), strict=True):
            q.copy_(p)
        padded = text_out(plain, t)
        alone = torch.cat([text_out(plain, {k: v[i : i + 1] for k, v in t.items()}) for i in range(len(NAMES))])
        base_alone = torch.cat(
            [text_out(base_model, {k: v[i : i + 1] for k, v in t.items()}) for i in range(len(NAMES))]
        )
        note = (
            ""
            if same([base_alone], [base], TOL)
            else "Transformers' own base model gives a text other features alone than in a batch"
        )
        require(note or same([padded], [alone], TOL), "unpacked: a text alone has other features than in a batch")
        packed = encode_texts(model, **{k: v for k, v in t.items() if k != "token_type_ids"})
        gap = f"{float((packed - padded).abs().max()):.2g} of {float(padded.abs().max()):.2g}"
        require(same([packed], [padded], TOL), f"packed texts have other features than unpacked ones, by {gap}")
        reload_equal(model, spec, [out], lambda m: [text_out(m, t)])
        one = get_peft_model(spec.build(), NPTConfig(num_text_tokens=2)).eval()
        tower = find_towers(base_model)["text"]
        table = getattr(base_model.get_submodule(tower.embeddings), tower.table).weight
        (p,) = adapter_params(one).values()
        first = tower.reading.front
        p.copy_(table[t["input_ids"][0, first : first + 2]])
        require(same([text_out(one, t)], [base], TOL), "prompts that equal the words they replace change the output")
        no_mask = {"input_ids": t["input_ids"]}
        b2 = text_out(base_model, no_mask)
        require(
            same([text_out(one, no_mask)], [b2], TOL),
            "without attention_mask: packed prompts that equal the words they replace change the output",
        )
        equal = dict(class_prompts([n for n in NAMES if len(n.split()) == 2], TEMPLATE, 2, tok, model=base_model))
        require(
            same([text_out(one, equal)], [text_out(base_model, equal)], TOL),
            "names of equal length (no padding): packed prompts that equal the words they replace change the output",
        )
    return note


def prototypes(spec):
    def call(m):
        return image_out(spec, m)

    with torch.no_grad():
        base = call(spec.build())
    for fields in ({}, {"num_vision_tokens": 2, "vision_depth": 2}):
        torch.manual_seed(1)
        try:
            model = get_peft_model(spec.build(), PrototypeConfig(projection_dim=16, **fields)).eval()
        except (ValueError, NotImplementedError):
            if fields:
                return "head only; with prompts refused as NPT"
            raise
        out = call(model)
        require(out[0].shape == base[0].shape, f"logits {tuple(out[0].shape)}")
        require(not same(out, base, 1e-4), "output does not change (silent no-op)")
        (out[0] ** 2).sum().backward()
        for n, p in adapter_params(model).items():
            if p.requires_grad:
                require(p.grad is not None and float(p.grad.abs().max()) > 0, f"no gradient reaches {n}")
        with torch.no_grad():
            out = call(model)
            with model.disable_adapter():
                require(same(call(model), base, 1e-6), "disabled adapter differs from the base model")
            reload_equal(model, spec, out, call)
    return ""


def copa(spec):
    def call(m):
        return image_out(spec, m)

    with torch.no_grad():
        base = call(spec.build())
        model = get_peft_model(spec.build(), CoPAConfig()).eval()
        pooling = find_pooling(spec.build())
        require(same(call(model), base, 1e-5), "identity heads change the output")
        feats = ImageFeatures(spec.build())(**image_inputs(spec))
        require(feats.shape == (3, pooling.width), f"features {tuple(feats.shape)}, width {pooling.width}")
        if spec.kind == "dual":
            own = base[0]
        else:
            o = spec.build()(**image_inputs(spec))
            own = getattr(o, "pooler_output", None)
            own = None if own is None else own.flatten(1)
        note = ""
        if own is not None and (own.shape != feats.shape or not torch.allclose(own, feats, atol=1e-4)):
            note = f"feature is at {pooling.path}, not the model's pooler_output"
        p = adapter_params(model)
        image = next(v for n, v in p.items() if "image_head" in n)
        image.copy_(torch.randn(image.shape, generator=torch.Generator().manual_seed(3)))
        out = call(model)
        if same(out, base, 1e-4):
            note += " head does not show in the model's own output"
        elif spec.kind == "dual" and base[0].dim() == 2 and base[0].shape[1] == len(image):
            require(
                torch.allclose(out[0], base[0] @ image, atol=1e-3),
                "the model's output is not the feature through the head",
            )
        with model.disable_adapter():
            require(same(call(model), base, 1e-6), "disabled adapter differs from the base model")
        reload_equal(model, spec, out, call)
    ds = dataset()
    fitted = adapt(
        spec.build(), ds["image"][:], [NAMES[label] for label in ds["label"]], steps=3, processor=processor_for(spec)
    )
    require(len(fitted.predict(ds["image"][:4])) == 4, "predict")
    try:
        model = get_peft_model(spec.build(), CoPAConfig(residual_adapters=True)).eval()
        out = call(model)
        sum((o.float() ** 2).sum() for o in out if o.is_floating_point()).backward()
        maps = {n: q for n, q in adapter_params(model).items() if "residual" in n}
        require(maps, "residual_adapters=True adds nothing (silent no-op)")
        require(
            all(q.grad is not None and float(q.grad.abs().max()) > 0 for q in maps.values()),
            "no gradient reaches the residual maps",
        )
        with torch.no_grad(), model.disable_adapter():
            require(same(call(model), base, 1e-6), "residual: disabled adapter differs from the base model")
    except Wrong:
        raise
    except Exception as e:
        note += f" | residual_adapters: {describe(e)}"
    return note.strip()


def adaptformer(spec):
    def call(m):
        return image_out(spec, m)

    torch.manual_seed(1)
    model = get_peft_model(spec.build(), AdaptFormerConfig(bottleneck_dim=16)).eval()
    with torch.no_grad():
        base = call(spec.build())
        require(same(call(model), base, 1e-5), "an untrained adapter changes the output")
        for p in adapter_params(model).values():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    out = call(model)
    require(not same(out, base, 1e-4), "output does not change (silent no-op)")
    if not any(o.requires_grad for o in out):
        raise NotApplicable("the model runs its image tower without gradients")
    sum((o.float() ** 2).sum() for o in out if o.is_floating_point()).backward()
    for n, p in adapter_params(model).items():
        require(p.grad is not None and float(p.grad.abs().max()) > 0, f"no gradient reaches {n}")
    with torch.no_grad():
        with model.disable_adapter():
            require(same(call(model), base, 1e-6), "disabled adapter differs from the base model")
        reload_equal(model, spec, out, call)
    return ""
