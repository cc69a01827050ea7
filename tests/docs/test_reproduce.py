"""The page of commands for the papers' tables: its rows agree with the descriptions, its commands and blocks run."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image

from peft_ncgeo.data import DatasetSource

from .pages import ROOT, blocks
from .test_blocks import commands

PAGE = ROOT / "docs" / "reproduce.md"
SETS = ROOT / "examples" / "datasets"
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines() if line[:2] == "| "]
BLOCKS = [commands(block) for block in blocks(PAGE, "bash")]


class ParsedError(Exception):
    """The script has read its command line."""


def test_rows_agree_with_the_descriptions():
    rows = {row[0]: row for row in ROWS if row[0].endswith(".yaml")}
    assert set(rows) == {path.name for path in SETS.glob("*.yaml")}
    checked = {name for row in ROWS for name in row[0].split(", ") if len(row) == 4}
    assert {name.removesuffix(".yaml") for name in rows} <= checked
    for name, (_, hub, classes, splits, template) in rows.items():
        source = DatasetSource.read(SETS / name)
        assert hub.startswith(source.path), name
        for word in (source.revision, source.image_column, source.label_column):
            assert word in (None, "image", "label") or f"`{word}`" in hub, name
        assert classes.split()[0] == str(source.num_classes), name
        assert splits == f"{source.train_split or '-'} / {source.test_split}", name
        assert template == source.template, name


def expanded(word: str) -> list[str]:
    """Return the words that a shell makes of braces and stars."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", word)
    words = [f"{found[1]}{middle}{found[3]}" for middle in found[2].split(",")] if found else [word]
    return [str(path) for word in words for path in (sorted(ROOT.glob(word)) if "*" in word else [word])]


def parse(line: str, monkeypatch) -> None:
    """Let a script parse a command, and stop it then; files of the repository that it names exist."""
    words = [new for word in shlex.split(line) for new in expanded(word)]
    assert all((ROOT / word).exists() for word in words if word.startswith("examples/")), line
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", words[start:])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names = runpy.run_path(str(ROOT / words[start]))["main"].__globals__
    (reader,) = {"model_and_processor", "parse_with_recipe"} & names.keys()

    def stop(*args, read=names[reader], **kwargs):
        if reader == "parse_with_recipe":  # which parses; the other is given what was parsed
            read(*args, **kwargs)
        raise ParsedError

    monkeypatch.setitem(names, reader, stop)
    with pytest.raises(ParsedError):
        names["main"]()


def test_commands_are_parsed(monkeypatch):
    """By the scripts' own parsers, for each value of a loop."""
    seen = 0
    for lines in BLOCKS:
        values = re.findall(r"for name in ([\w ]+);", "\n".join(lines))
        for line in [line for line in lines if ".py" in line]:
            for value in values[0].split() if "$name" in line else [""]:
                parse(line.replace("$name", value), monkeypatch)
                seen += 1
    assert seen == 11 + 11 + 2 + 3 + 1


def draw(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def run(word: str, changes: dict[str, str]) -> None:
    (block,) = [block for block in blocks(PAGE, "python") if word in block.code]
    code = block.code
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, block.name, "exec"), {})


def test_a_published_split_keeps_images_names_and_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    items = [["x/0.png", 1, "face"], ["x/1.png", 0, "water_lilly"], ["x/2.png", 2, "ant"], ["x/3.png", 1, "face"]]
    for i in range(4):
        draw(tmp_path / f"caltech-101/101_ObjectCategories/x/{i}.png", 10 * i)
    split = {"train": items[:3], "val": [], "test": items[3:]}
    Path("caltech-101/split_zhou_Caltech101.json").write_text(json.dumps(split))
    run("split_zhou", {"data/": f"{tmp_path}/data/"})
    source = DatasetSource.read("data/caltech101.yaml")
    train, test = source.load("train"), source.load("test")
    assert train.features["label"].names == ["water_lilly", "face", "ant"]
    assert (train["label"][:], test["label"][:]) == ([1, 0, 2], [1])
    assert test[0]["image"].getpixel((0, 0)) == (30, 30, 30)
    assert source.template == DatasetSource.read(SETS / "caltech101.yaml").template


def test_a_list_of_files_becomes_a_set_with_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(f"path: a\nnum_classes: 2\nclass_names: {SETS / 'imagenet_names.txt'}\n")
    for i, number in enumerate(("n01514668", "n01498041")):
        for part in ("train", "val"):
            draw(tmp_path / f"imagenet/{part}/{number}/{part}{i}.png", 10 * i)
    rows = ["train/n01514668/train0.png 1", "train/n01498041/train1.png 0"]
    Path("ImageNet_LT_train.txt").write_text("\n".join(rows))
    Path("ImageNet_LT_test.txt").write_text("\n".join(row.replace("train", "val") for row in rows))
    run("ImageNet_LT", {"examples/datasets/imagenet_lt.yaml": "two.yaml"})
    parts = load_from_disk("data/named/lift_imagenet_lt")
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 2, "test": 2, "validation": 2}
    assert parts["train"].features["label"].names == ["stingray", "rooster"]
    pixels = {row["label"]: row["image"].getpixel((0, 0))[0] for row in parts["test"]}
    assert pixels == {0: 10, 1: 0}
