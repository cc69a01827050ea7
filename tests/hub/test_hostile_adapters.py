"""Adapters that somebody made to take this machine's memory: refused before anything of that size is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_ncgeo import CoPAConfig, FewShotClassifier, NPTConfig, PrototypeConfig, adapt
from peft_ncgeo.hub import hypothesis_template, load_adapter, save_adapter
from peft_ncgeo.models.tensor_files import read_shapes
from peft_ncgeo.training import Recipe
from peft_ncgeo.training.state.files import load_state, save_state

from ..conftest import pixels, tiny_clip, tiny_vit, tiny_vit_classifier

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"), pytest.mark.slow]
CONFIG, WEIGHTS, NAMES = "adapter_config.json", "adapter_model.safetensors", "class_names.json"
KINDS: dict[str, tuple[Any, Any]] = {
    "prompts": (tiny_clip, lambda: NPTConfig(num_text_tokens=3, num_vision_tokens=2, text_init=[6, 7])),
    "prototypes": (tiny_vit_classifier, lambda: PrototypeConfig(num_vision_tokens=1)),
    "heads": (tiny_vit, lambda: CoPAConfig()),
    "head": (tiny_vit_classifier, lambda: NPTConfig.vpt(vision_depth=2, modules_to_save=["classifier"])),
    "LORA": (tiny_clip, lambda: LoraConfig(r=2, target_modules=["q_proj"])),
    "LOHA": (tiny_clip, lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"])),
    "VERA": (tiny_clip, lambda: peft.VeraConfig(r=2, target_modules=["q_proj"])),
}
MANY = 3 * 10**6  # rows of 32 numbers: 400 MB
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("prompts", {"num_vision_tokens": MANY}),
    ("prompts", {"num_vision_tokens": 10**4, "vision_depth": 10**4}),
    ("prompts", {"num_text_tokens": MANY, "token_ids": None}),
    ("prompts", {"num_vision_tokens": 10**90}),
    ("prompts", {"first_layer": 10**9}),
    ("prompts", {"vision_depth": 10**18}),
    ("prompts", {"template": "x" * 10**5 + "{}"}),
    ("prompts", {"text_init": "a photo " * 10**4}),
    ("prompts", {"text_init": [6] * 10**5}),
    ("prompts", {"text_init": [2**40]}),
    ("prompts", {"exclude_modules": ["x" * 5000]}),
    ("prompts", {"modules_to_save": ["x"] * 20_000}),
    ("prompts", {"tokenizer_name_or_path": "x/" * 10**4}),
    ("prompts", {"token_ids": {"of": [], "text_init": [6] * 10**5, "placeholders": []}}),
    ("prompts", {"token_ids": {"of": [], "text_init": [6], "placeholders": [1e30]}}),
    ("prototypes", {"num_classes": 3000, "projection_dim": 3000}),
    ("prototypes", {"num_classes": 10**9}),
    ("prototypes", {"num_classes": 10**5, "projection_dim": 10**5}),
    ("prototypes", {"projection_dim": 10**9}),
    ("prototypes", {"prototypes_per_class": 10**12}),
    ("prototypes", {"geometry": "given", "num_classes": 3000, "projection_dim": 3000}),
    ("heads", {"num_features": 10**9}),
    ("LORA", {"r": MANY}),
    ("LORA", {"r": 2 * 10**9}),
    ("LORA", {"rank_pattern": {"q_proj": MANY}}),
    ("LOHA", {"r": MANY}),
    ("VERA", {"r": MANY}),
    ("LORA", {"target_modules": r"([a-z0-9_.]+)+!"}),
    ("LORA", {"target_modules": ".*" * 30 + "!"}),
    ("LORA", {"exclude_modules": r"(\w|\w|\.)+!"}),
    ("LORA", {"rank_pattern": {r"(.*)*!": 2}}),
    ("LORA", {"modules_to_save": [f"x{i}" for i in range(9000)]}),
    ("LORA", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": r"(.+)+!"}),
    ("prompts", {"modules_to_save": [r"(.*.*)*!"]}),
]


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        real = [tensor for tensor in tensors if not tensor.is_meta]  # which has no memory
        sizes = [tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in real]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


def saved(kind: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    base, config = KINDS[kind]
    torch.manual_seed(0)
    get_peft_model(base(), config()).save_pretrained(folder)
    return base(), load_file(folder / WEIGHTS)


def write_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(("kind", "changes"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_config_that_asks_for_more_than_its_file_holds(tmp_path, kind, changes):
    base, _ = saved(kind, tmp_path)
    write_config(tmp_path, **changes)
    before = dict(base.named_modules())
    with Largest() as largest, pytest.raises(ValueError, match=r"adapter_config|does not fit") as refusal:
        load_adapter(tmp_path, base)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert largest.numbers < 2 * 10**6  # the slack for small models, with all that was made before
    assert dict(base.named_modules()) == before


@pytest.mark.parametrize(
    ("kind", "changes"), [(kind, changes) for kind, changes in HOSTILE if kind.islower() and "*!" not in str(changes)]
)
def test_by_peft_alone_the_configs_bounds_hold(tmp_path, kind, changes):
    """Without a look at the file, a gigabyte at most."""
    base, _ = saved(kind, tmp_path)
    write_config(tmp_path, **changes)
    with Largest() as largest, pytest.raises(Exception, match=r"."):
        PeftModel.from_pretrained(base, tmp_path)
    assert largest.numbers <= 10**7


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("prompts", {"num_vision_tokens": 10**4, "vision_depth": 4}),
        ("prompts", {"num_text_tokens": 10**4, "token_ids": None}),
        ("prototypes", {"num_classes": 3000, "projection_dim": 3000}),
        ("LORA", {"r": 10**4}),
        ("LORA", {"rank_pattern": {"q_proj": 10**4}}),
    ],
)
def test_a_large_base_model_buys_nothing(tmp_path, kind, changes):
    """The size that is allowed follows from the file, not from the base model's own weights."""
    base, _ = saved(kind, tmp_path)
    write_config(tmp_path, **changes)
    base.register_parameter("more", torch.nn.Parameter(torch.zeros(1).expand(10**9), requires_grad=False))
    with Largest() as largest, pytest.raises(ValueError, match="fit"):
        load_adapter(tmp_path, base)
    assert largest.numbers < 2 * 10**6


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_load_as_they_were_saved(tmp_path, kind):
    base, tensors = saved(kind, tmp_path)
    loaded = get_peft_model_state_dict(load_adapter(tmp_path, base))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["head", "prototypes"])
def test_names_without_a_head_of_as_many_rows(tmp_path, kind):
    """The base model is loaded with a head for as many classes, which nothing may ask for but the file."""
    tiny_vit_classifier().save_pretrained(tmp_path / "base")
    saved(kind, tmp_path)
    (tmp_path / NAMES).write_text(json.dumps([f"{i:x}" for i in range(10**5)]))
    with Largest() as largest, pytest.raises(ValueError, match="class_names.json beside .* has 100000 names"):
        load_adapter(tmp_path, str(tmp_path / "base"))
    assert largest.numbers < 10**5


NESTED, DIGITS = "[" * 10**5, "9" * 10**5


@pytest.mark.parametrize(
    "content", [NESTED, DIGITS, "[" * 60 + "]" * 60, '["a", "b"]' + " " * 2**20, '{"a": 1, "a": 2}']
)
@pytest.mark.parametrize("file", [CONFIG, NAMES])
def test_json_without_end(tmp_path, file, content):
    base, _ = saved("head", tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=rf"{file}.*is damaged: .*(deep|characters|bytes|twice)"):
        load_adapter(tmp_path, base)
    if file == CONFIG:
        with pytest.raises(ValueError, match=f"{file}.*is damaged"):
            hypothesis_template(tmp_path)


def with_kind(path: Path, kind: str, bits: int) -> None:
    """Write a file's tensors again as numbers of another kind, all of them 0."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8 : 8 + size]), 0
    for stored in (stored for name, stored in header.items() if name != "__metadata__"):
        stored["dtype"], start = kind, end
        end += -(-torch.Size(stored["shape"]).numel() * bits // 8)
        stored["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


@pytest.mark.parametrize(("kind", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("F8_E4M3", 8), ("C64", 64)])
def test_numbers_that_nobody_trains(tmp_path, kind, bits):
    base, _ = saved("prompts", tmp_path / "prompts")
    adapt(get_peft_model(tiny_vit(), CoPAConfig()), pixels(4), [0, 1, 0, 1], steps=1).save_pretrained(tmp_path / "few")
    memory: Any = torch.nn.Module()
    memory.register_buffer("kept", torch.ones(4, 8))
    memory.name = "memory"
    save_state([memory], tmp_path)
    cases = {
        tmp_path / "prompts" / WEIGHTS: lambda: load_adapter(tmp_path / "prompts", base),
        tmp_path / "few" / "prototypes.safetensors": lambda: FewShotClassifier.from_pretrained(
            tmp_path / "few", tiny_vit()
        ),
        tmp_path / "geometry_state.safetensors": lambda: load_state([memory], tmp_path),
    }
    for file, load in cases.items():
        with_kind(file, kind, bits)
        with pytest.raises(ValueError, match=f"{kind}.*16.*more"):
            load()


def test_a_header_without_end_is_not_read(tmp_path):
    base, _ = saved("prompts", tmp_path)
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)  # takes no place on the disk
    with pytest.raises(ValueError, match="its header would have 1,099,511,627,776 bytes"):
        load_adapter(tmp_path, base)


@pytest.mark.parametrize("classes", [NESTED, DIGITS, "{}", "[" * 60 + "]" * 60])
def test_classes_beside_prototypes_without_end(tmp_path, classes):
    adapt(get_peft_model(tiny_vit(), CoPAConfig()), pixels(4), [0, 1, 0, 1], steps=1).save_pretrained(tmp_path)
    file = tmp_path / "prototypes.safetensors"
    save_file(load_file(file), file, {"classes": classes})
    with pytest.raises(ValueError, match="prototypes.safetensors in .* is damaged"):
        FewShotClassifier.from_pretrained(tmp_path, tiny_vit())


@pytest.mark.parametrize("name", ["a/b", "/absolute", "x" * 300])
def test_an_adapter_is_not_saved_outside_its_folder(tmp_path, name):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / NAMES).write_text("[]")
    prompted = get_peft_model(tiny_vit(), NPTConfig(num_vision_tokens=1), adapter_name=name)
    heads = adapt(get_peft_model(tiny_vit(), CoPAConfig(), adapter_name=name), pixels(4), [0, 1, 0, 1], steps=1)
    for save in (lambda folder: save_adapter(prompted, folder), lambda folder: save_adapter(heads, folder)):
        with pytest.raises(ValueError, match="of an adapter cannot be a file's"):
            save(tmp_path / "saved")
    with pytest.raises(ValueError, match="of an adapter cannot be a file's"):
        heads.save_pretrained(tmp_path / "saved")
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", NAMES]  # what was there is still there


def test_shapes_are_those_of_the_tensors(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.float64), "c": torch.zeros(0, 5)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert read_shapes(tmp_path / "x.safetensors") == {"a": (2, 3), "b": (), "c": (0, 5)}


def test_a_recipe_cannot_ask_for_them_either(tmp_path):
    (tmp_path / "big.yaml").write_text("peft: {NPTConfig: {num_vision_tokens: 20000000}}")
    with pytest.raises(ValueError, match="big.yaml.*num_vision_tokens=20000000 must.*whole.*most 10,000"):
        Recipe.read(tmp_path / "big.yaml")
    (tmp_path / "big.yaml").write_text(f"? {'losse' * 10**5}\n: []")
    with pytest.raises(ValueError, match="unknown key 'losse"):
        Recipe.read(tmp_path / "big.yaml")
