"""Configs of any values: what stands in them is what the model gets and what the file says, or one line refuses it."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, NPTConfig, PrototypeConfig

from ..conftest import pixels, texts, tiny_clip, tiny_vit_classifier
from ..profiles import cases
from .outcomes import said_well

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
MODELS = {"clip": tiny_clip(), "vit": tiny_vit_classifier()}
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
wild = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | words | st.binary(max_size=3) | st.just(10**12)
    | st.lists(st.integers(-1, 60) | words | st.floats(), max_size=3) | st.dictionaries(words, words, max_size=1)
    | st.sampled_from([np.int64(2), np.float32(0.5), np.arange(3), torch.eye(2), object(), "classifier", ["vit"]])
)  # fmt: skip
small = st.integers(0, 4)
PROMPTS = {
    "num_text_tokens": small, "num_vision_tokens": small,
    "text_depth": st.integers(1, 5), "vision_depth": st.integers(1, 5),
    "first_layer": st.integers(0, 1), "coupling": st.sampled_from(["independent", "independent", "coupled"]),
    "text_init": st.none() | st.lists(st.integers(0, 49), max_size=5), "template": st.just("the {}."),
    "init_std": st.floats(0, 1), "init_weights": st.booleans(), "pack_text": st.booleans(),
    "exclude_modules": st.none(), "tokenizer_name_or_path": st.none(),
}  # fmt: skip
FIELDS: dict[Any, dict[str, Any]] = {
    NPTConfig: PROMPTS | {"modules_to_save": st.none()},
    PrototypeConfig: {name: PROMPTS[name] for name in ("num_vision_tokens", "vision_depth", "init_std")} | {
        "num_classes": st.none() | st.just(5), "projection_dim": st.sampled_from([None, 4, 9]),
        "trainable": st.booleans(),
        "geometry": st.sampled_from(["etf", "minority_margin", torch.eye(5, 7), [[1.0, 0], [0, 1]]]),
        "class_counts": st.sampled_from([None, [1, 2, 3, 4, 5], (9, 9, 9, 9, 9)]), "margin_strength": st.floats(0, 2),
        "temperature": st.floats(0.01, 9), "prototypes_per_class": small,
    },
    CoPAConfig: {
        "num_features": st.none(), "shared": st.booleans(), "residual_adapters": st.booleans(),
        "temperature": st.none() | st.floats(0.01, 9), "modules_to_save": st.none(),
    },
    AdaptFormerConfig: {
        "bottleneck_dim": st.none() | small, "num_classes": st.none() | st.integers(0, 200),
        "modules_to_save": st.none(),
    },
}  # fmt: skip


@cases(2.4)
@given(data=st.data(), kind=st.sampled_from(sorted(FIELDS, key=str)), base=st.sampled_from(sorted(MODELS)))
def test_a_config_on_a_model(tmp_path_factory, data, kind, base):
    """One value at most is of another kind."""
    fields = {name: data.draw(right, name) for name, right in FIELDS[kind].items()}
    if data.draw(st.booleans()):
        others = {"token_ids", "modules_to_save"} & {*kind.__dataclass_fields__}
        odd = data.draw(st.sampled_from(sorted({*fields, *others})))
        fields[odd] = data.draw(wild)
    model = copy.deepcopy(MODELS[base])
    names = [name for name, _ in model.named_parameters()]
    tuned = said_well(lambda: get_peft_model(model, kind(**fields)), ValueError, TypeError)
    event(f"taken: {tuned is not None}")
    if tuned is None:
        assert [name for name, _ in model.named_parameters()] == names  # nothing was half put in
        return
    learned = get_peft_model_state_dict(tuned)
    assert learned
    assert all(tensor.isfinite().all() for tensor in learned.values())
    if kind in (NPTConfig, PrototypeConfig):
        slots = min(fields.get("num_text_tokens", 0), 0 if base == "vit" else 9)
        prompts = [len(value) for name, value in learned.items() if name.endswith("_prompt") and "text" in name]
        depth = min(fields.get("text_depth", 0), 3 - fields.get("first_layer", 0))
        assert prompts == [slots] * depth if slots else not prompts
    with torch.no_grad():
        inputs = {"input_ids": texts(slots=4)["input_ids"]} if base == "clip" else {}
        out = tuned.eval()(pixel_values=pixels(), **inputs)
    assert (out.logits if base == "vit" else out.logits_per_image).isfinite().all()
    folder = tmp_path_factory.getbasetemp()
    tuned.save_pretrained(folder)
    written = PeftConfig.from_pretrained(folder)
    for name, value in fields.items():
        if name not in ("geometry", "num_features", "num_classes", "token_ids") and value is not None:
            expected = [value] if name == "modules_to_save" and isinstance(value, str) else value
            expected = list(expected) if isinstance(expected, tuple | np.ndarray) else expected
            assert getattr(written, name) == expected


presets = ["coop", "vpt", "ivlp", "maple", "npt", "prompt_ot"]


@cases(1.2)
@given(data=st.data(), preset=st.sampled_from(presets), field=st.sampled_from(sorted(PROMPTS)), value=wild)
@example(data=None, preset="coop", field="modules_to_save", value="classifier")
def test_presets_take_fields_of_any_kind(data, preset, field, value):
    config = said_well(lambda: getattr(NPTConfig, preset)(**{field: value}))
    if config is not None:
        assert NPTConfig(**{name: getattr(config, name) for name in [*PROMPTS, "modules_to_save"]}) == config
        json.dumps(config.to_dict())
        if field == "modules_to_save":
            assert config.modules_to_save == [value]
