"""Fingerprints change with all that a cell is made of, and with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import CLIPImageProcessor, TrainerCallback

from peft_ncgeo import NPTConfig, PrototypeConfig
from peft_ncgeo.protocols.fingerprints import dataset_fingerprint, fingerprint, recipe_fingerprint
from peft_ncgeo.training import PromptAveraging, Recipe

from ..conftest import NAMES, pixels, texts, tiny_clip, tiny_images, tiny_processor
from ..launching import launch_script

SCRIPT = """
from functools import cached_property, lru_cache, partial
import torch
from peft_ncgeo.losses import OTPreservation

RATE = 0.5
TABLE = {"a": [1, 2]}

def scaled(progress, factor=1.0):
    return factor * progress * RATE

class Mine(OTPreservation):
    temperature = 2.0

    def __init__(self, levels):
        super().__init__(weight=partial(scaled, factor=3.0))
        self.levels, self.target = levels, torch.eye(30)
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, batch):
        return self.temperature * super().forward(batch) + len(TABLE["a"])

def losses():
    shift = 4
    return [Mine([1, (2, 3)]), OTPreservation(weight=lambda progress: progress + shift)]
"""
CHANGES = [
    ("RATE = 0.5", "RATE = 0.6"),
    ('"a": [1, 2]', '"a": [1, 3]'),
    ("factor=1.0", "factor=2.0"),
    ("factor=3.0", "factor=4.0"),
    ("progress * RATE", "progress / RATE"),
    ("temperature = 2.0", "temperature = 2.5"),
    ("(2, 3)", "(2, 4)"),
    ("torch.eye(30)", "torch.eye(30).flip(0)"),
    ("torch.eye(30)", "torch.eye(30).double()"),
    ("Linear(2, 2)", "Linear(2, 2, bias=False)"),
    ("len(TABLE", "max(TABLE"),
    ("shift = 4", "shift = 5"),
    ("progress + shift", "progress - shift"),
]
ELSEWHERE = """
import sys, warnings
from pathlib import Path
import torch
from peft import LoraConfig
from peft_ncgeo.protocols import FewShotMethod, Task, few_shot, run_cells
from peft_ncgeo.training import Recipe
from tests.conftest import tiny_clip, tiny_images, tiny_processor, tiny_vit

warnings.simplefilter("ignore", UserWarning)
folder, images = Path(sys.argv[1]), tiny_images(12)

def note(trainer, evaluate):
    with open(folder / "trained", "a") as file:
        print(sys.flags.hash_randomization, file=file)
    return {"kinds": len({"a", "b", "c"})} if trainer.args.seed in {1, 2, 3, 4} else {}

lora = Recipe("lora", lambda: LoraConfig(target_modules={"q_proj", "k_proj", "v_proj", "fc1"}), args={"max_steps": 1})
settings = {"a": lambda seed: Task(images, {"test": images})}
run_cells([lora], settings, tiny_clip, tiny_processor(), folder / "cells", (1,), after=note)
sgd = {"steps": 1, "optimizer": lambda parameters, lr, weight_decay=0.0: torch.optim.SGD(parameters, lr)}
few_shot([FewShotMethod("sgd", settings=sgd)], {"a": images}, tiny_vit, tiny_processor(), folder / "blocks", 2)
"""


def written(source: str) -> Recipe:
    """The recipe of a user's script."""
    names = {"__name__": "script"}
    exec(source, names)
    return Recipe("mine", lambda: NPTConfig.coop(num_text_tokens=4), names["losses"])


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_change_in_a_users_script_changes_it(before, after):
    assert before in SCRIPT
    assert recipe_fingerprint(written(SCRIPT)) != recipe_fingerprint(written(SCRIPT.replace(before, after)))


def test_comments_lines_and_random_numbers_do_not_change_it():
    first = recipe_fingerprint(written(SCRIPT))
    torch.rand(3)
    assert (
        recipe_fingerprint(written(SCRIPT.replace("RATE = 0.5", "# before training\n\nRATE = 0.5  # half"))) == first
    )
    assert recipe_fingerprint(written(SCRIPT)) == first


def test_every_part_of_a_recipe_counts():
    recipe = Recipe.from_dict("r", {"peft": {"NPTConfig.coop": {}}, "losses": [{"OTPreservation": {"weight": 1}}]})
    points = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    others = [
        recipe,
        replace(recipe, config=lambda: NPTConfig.coop(num_text_tokens=8)),
        replace(recipe, config=lambda: PrototypeConfig(geometry=points)),
        replace(recipe, config=lambda: PrototypeConfig(geometry=points.roll(1))),
        replace(recipe, losses=list),
        replace(recipe, classification_loss=lambda: None),
        replace(recipe, callbacks=lambda: [PromptAveraging(mean=3)]),
        replace(recipe, callbacks=lambda: [PromptAveraging(mean=4)]),
        replace(recipe, args={"max_steps": 3}),
        replace(recipe, args={"max_steps": 3.0}),
    ]
    assert len({recipe_fingerprint(other) for other in others}) == len(others)
    assert recipe_fingerprint(replace(recipe)) == recipe_fingerprint(recipe)


def test_order_counts_where_it_means_something():
    pairs = [({1, "a", (2, 3)}, {(2, 3), "a", 1}), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ([1, 2], (1, 2))]
    for one, other in pairs:
        assert fingerprint("x", one) == fingerprint("x", other)
    different = [
        [1, 2],
        [2, 1],
        [[1], 2],
        [1, [2]],
        ["ab", "c"],
        ["a", "bc"],
        {"a": 1},
        {"a": 2},
        {1, 2},
        1,
        True,
        "1",
    ]
    assert len({fingerprint("x", value) for value in different}) == len(different)


def test_what_holds_itself_has_one():
    class Node:
        pass

    def ring(value):
        node, other = Node(), Node()
        node.next, other.next, other.value = other, node, value
        return node

    assert fingerprint("x", ring(1)) == fingerprint("x", ring(1)) != fingerprint("x", ring(2))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.zeros_(model.visual_projection.weight[-1:, -1:]),
        lambda model: nn.init.ones_(model.text_model.encoder.layers[1].mlp.fc2.bias[-1:]),
        lambda model: model.vision_model.embeddings.position_ids.add_(1),  # not in the state dict
        lambda model: setattr(model.config.vision_config, "layer_norm_eps", 1e-3),
        lambda model: setattr(model.text_model.final_layer_norm, "eps", 1e-3),
        lambda model: model.half(),
    ],
)
@torch.no_grad()
def test_every_number_of_a_model_counts(change):
    model = tiny_clip()
    first = fingerprint("x", model)
    model(pixel_values=pixels(), **texts())
    assert fingerprint("x", model) == first == fingerprint("x", tiny_clip())
    change(model)
    assert fingerprint("x", model) != first


def test_a_processor_is_known_by_what_it_does():
    first = fingerprint("x", tiny_processor())
    used = tiny_processor()
    used(text=NAMES, images=tiny_images(2)["image"][:], padding=True, truncation=True, max_length=9)
    assert fingerprint("x", used) == first
    size = {"height": 16, "width": 16}
    others = [tiny_processor() for _ in range(4)]
    others[0].image_processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=[0.5, 0.5, 0.5])
    others[1].image_processor.do_center_crop = False
    others[2].tokenizer.add_tokens(["panther"])
    others[3].tokenizer.model_max_length = 9
    assert len({first, *(fingerprint("x", other) for other in others)}) == 5


def test_every_image_counts():
    images = tiny_images(50)
    rows = [images[i] for i in range(50)]
    rows[17]["image"] = rows[17]["image"].transpose(0)
    other = Dataset.from_list(rows, features=images.features)
    first = dataset_fingerprint(images, "label")
    assert first == dataset_fingerprint(
        Dataset.from_list([images[i] for i in range(50)], features=images.features), "label"
    )
    assert first == dataset_fingerprint(images.with_format("numpy").add_column("id", list("ab" * 25)), "label")
    darker = images.with_transform(
        lambda batch: {**batch, "image": [image.point(lambda x: x // 2) for image in batch["image"]]}
    )
    assert len({first, dataset_fingerprint(other, "label"), dataset_fingerprint(darker, "label")}) == 3
    assert fingerprint("x", partial(print, images)) != fingerprint("x", partial(print, other))


class Noted(TrainerCallback):
    def __init__(self, held):
        self.held = held


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ((i for i in range(3)), "generator"),
        (threading.Lock(), "lock"),
        ([{"deep": nn.Linear(2, 2, device="meta")}], "tensor"),
        (partial(print, threading.Lock()), "lock"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(held, said):
    recipe = Recipe("mine", lambda: LoraConfig(target_modules={"q_proj"}), callbacks=lambda: [Noted(held)])
    with pytest.raises(ValueError, match=rf"^Recipe 'mine' holds .*{said}.*$"):
        recipe_fingerprint(recipe)


class Layers(nn.Module):
    """Parts that pickle refuses, or that are kept once they are computed."""

    def __init__(self, bias):
        super().__init__()
        torch.manual_seed(0)
        self.layer = weight_norm(nn.Linear(2, 2))
        nn.init.constant_(self.layer.bias, bias)

    @cached_property
    def doubled(self):
        return 2 * self.layer.bias

    @property
    def width(self):
        return 2

    @staticmethod
    @lru_cache
    def power(number):
        return number**2


def test_parts_of_the_users_own_modules():
    assert fingerprint("x", Layers(1.0)) == fingerprint("x", Layers(1.0)) != fingerprint("x", Layers(2.0))


def test_nested_too_deep():
    inner: list = []
    for _ in range(5000):
        inner = [inner]
    with pytest.raises(ValueError, match="too deep"):
        fingerprint("x", inner)


def test_numbers_of_all_kinds():
    values = [torch.ones(2, dtype=kind) for kind in (torch.float32, torch.float64, torch.bfloat16, torch.int64)]
    values += [
        torch.zeros(0, 3),
        torch.zeros(3, 0),
        torch.tensor(1.0),
        np.ones(2),
        np.ones((2, 1)),
        np.float32(1),
        None,
    ]
    values += [torch.arange(6).view(2, 3), torch.arange(6).view(2, 3).T, torch.arange(6)]
    assert len({fingerprint("x", value) for value in values}) == len(values)
    table = torch.arange(6).view(2, 3)
    assert fingerprint("x", table.T) == fingerprint("x", table.T.clone())


@pytest.mark.slow
def test_another_process_goes_on_with_lora_and_lambdas(tmp_path):
    """The hash seed does not matter, though it changes the order of sets of texts."""
    root = str(Path(__file__).parents[2])
    (tmp_path / "script.py").write_text(ELSEWHERE)
    launch_script(tmp_path / "script.py", str(tmp_path), out=tmp_path, processes=1)
    environment = {**os.environ, "PYTHONHASHSEED": "2", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "script.py", str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len((tmp_path / "trained").read_text().splitlines()) == 1
