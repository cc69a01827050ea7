"""Python blocks of README and docs run, two steps a training; commands and files that the pages name exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
from typer.main import get_command

from peft_ncgeo import GeometryTrainingArguments
from peft_ncgeo.cli import app

from ..training.runs import trainer
from .pages import PAGES, README, ROOT, Block, blocks, name, prose, table

PYTHON = [block for page in PAGES for block in blocks(page, "python")]
SHELL = [block for page in PAGES for block in blocks(page, "bash")]
STEPS = re.compile(r"(max_steps(?:\"?: |=)|\bsteps=)\d+|num_train_epochs=\d+")
CLI = get_command(app).commands  # type: ignore[attr-defined]
OPTION = re.compile(r"--[a-z]\w+")


def shorter(code: str) -> str:
    """Return the code with two steps a training."""
    return STEPS.sub(lambda found: f"{found[1] or 'max_steps='}2", code)


@pytest.mark.slow
def test_python_blocks_run_and_warn_of_nothing(tmp_path):
    """In a process of their own, whose warnings are those that a user sees."""
    pages = [
        (name(page), [shorter(block.code) for block in blocks(page, "python") if not block.not_run]) for page in PAGES
    ]
    (tmp_path / "blocks.json").write_text(json.dumps([page for page in pages if page[1]]))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.docs.run_blocks", "blocks.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)  # seconds of each block, where the test fails
    assert "torch.Size([2, 128])" in done.stdout
    assert "torch.Size([2, 5])" in done.stdout
    assert (tmp_path / "outputs" / "readme" / "adapter_model.safetensors").exists()
    warned = [line for line in done.stderr.splitlines() if "warning" in line.lower() or "warnings.warn" in line]
    assert not [line for line in warned if "Unsupported layer type" not in line]  # PEFT's, of its own LNTuningConfig


def test_blocks_that_are_not_run_compile_and_say_why():
    left_out = [block for block in PYTHON if block.not_run]
    assert len(left_out) < len(PYTHON) / 4
    for block in left_out:
        compile(block.code, block.name, "exec")
        assert re.search(r"\b(Hub|GPU|hours?|seconds|network)\b", block.not_run or ""), block.name
    marks = sum(page.read_text().count("<!-- not run") for page in PAGES)
    assert marks == sum(block.not_run is not None for page in PAGES for block in blocks(page))  # each before its block


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_readers_own_loss_trains_beside_the_packages(tmp_path):
    (block,) = [block for block in PYTHON if "class KeepSimilarities" in block.code]
    names: dict = {}
    exec(compile(block.code, block.name, "exec"), names)
    run = trainer(tmp_path / "own", losses=names["losses"], max_steps=2)
    run.train()
    assert {"loss/ot", "loss/similarities", "lambda/similarities"} <= run.state.log_history[-2].keys()


# ------------------------------------------------------------------------------------------------ shell


def commands(block: Block) -> list[str]:
    """Return the lines of a block with continued ones joined, comments taken off."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*$|^#.*$", "", line).strip() for line in lines) if line]


def declared(script: str) -> str:
    """Return the text in which a script's options are declared: its own, and that of parsers it shares."""
    code = (ROOT / script).read_text()
    shared = {
        "protocol_parser": "peft_ncgeo/protocols/command_line.py",
        "own_images": "examples/own_images.py",
        "train_prompt_ot": "examples/train_prompt_ot.py",
    }
    return code + "".join((ROOT / path).read_text() for word, path in shared.items() if word in code)


def strange(line: str) -> list[str]:
    """Return what a command names that does not exist: targets of make, scripts, options of scripts and the CLI."""
    makefile = (ROOT / "Makefile").read_text()
    found = [target for target in re.findall(r"\bmake ([\w-]+)", line) if f"\n{target}:" not in makefile]
    script = next((word for word in shlex.split(line) if word.endswith(".py")), None)
    if script and not (ROOT / script).exists():
        found.append(script)
    elif script:
        text = declared(script)
        found += [option for option in OPTION.findall(line.split(script)[1]) if not is_option(option, text)]
    command = re.search(r"(?:peft-ncgeo|-m peft_ncgeo\.cli) (\w+)", line)
    if command:
        own = {option for parameter in CLI[command[1]].params for option in parameter.opts}
        options = set(OPTION.findall(line.split(command[0])[1])) - own
        found += [option for option in options if command[1] != "train" or not is_option(option, "")]
    return found


def is_option(option: str, code: str) -> bool:
    """Return True for an option that `code` declares, or for a field of the training arguments."""
    field = option[2:].replace("-", "_")
    mentioned = re.search(rf'"{re.escape(option)}"|^    {field}: ', code, flags=re.MULTILINE)
    return bool(mentioned) or field in GeometryTrainingArguments.__dataclass_fields__ or option == "--help"


def test_commands_name_scripts_options_and_targets_that_exist():
    lines = [(block.page, line) for block in SHELL for line in commands(block)]
    assert len(lines) > 30
    assert not [(page, line, found) for page, line in lines if (found := strange(line))]
    assert strange("python examples/adapt_copa.py --wayz 5") == ["--wayz"]
    assert strange("peft-ncgeo predict outputs/own photos --recipe own") == ["--recipe"]


def test_files_and_targets_named_in_the_text_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text()
        for path in set(re.findall(r"(?<![\w/.-])(?:examples|peft_ncgeo|benchmarks)/[\w/.]+", text)):
            assert (ROOT / path.rstrip(".")).exists(), (name(page), path)
        for target in set(re.findall(r"`make ([\w-]+)", prose(page))):
            assert f"\n{target}:" in makefile, (name(page), target)


# ------------------------------------------------------------------------------------------------ README


def test_readme_is_read_in_ten_minutes():
    text = README.read_text()
    assert len(text.splitlines()) <= 250
    assert text.count("<!-- results table -->") == 1
    assert text.count("![") == 1
    for word in ("make demo", "make test", "open_clip", "caption", "FSDP", "GPU"):
        assert word in text


def test_nothing_is_left_to_fill_in():
    for page in PAGES:
        text = page.read_text()
        for mark, rows in re.findall(r"<!-- ([\w ]+) table -->(.*?)<!-- end of", text, flags=re.DOTALL):
            assert rows.count("\n|") > 2, f"{name(page)}: {mark} has no rows"
        assert not re.findall(r"\b(TODO|CHOICES|SPEED|ANSWER|[A-Z]+-(TEXT|TABLE))\b", text), name(page)


def test_readmes_table_is_of_the_kept_numbers():
    """Means and deviations over seeds; "another artist" is the mean over both artists of each seed."""
    frame = pd.DataFrame(json.loads((ROOT / "examples" / "results" / "base_to_new_demo.json").read_text())["rows"])
    alone = frame[frame.setting.isin(["tau=1, twemoji alone", "tau=1, emojione alone"])]
    columns = {
        "balanced": frame[frame.setting == "tau=1"].set_index(["method", "seed"]).H,
        "tail, 100 to 1": frame[frame.setting == "IF 100"].set_index(["method", "seed"]).H,
        "another artist": alone.groupby(["method", "seed"]).H_other.mean(),
    }
    head, _, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table("results").splitlines())
    assert head == ["H", *columns]
    assert {"zero-shot", "lora_budget"} < {method for method, *_ in body}
    for method, *cells in body:
        for values, cell in zip(columns.values(), cells, strict=True):
            mean, deviation = map(float, cell.split(" ± "))
            assert mean == pytest.approx(values[method].mean(), abs=0.051), (method, cell)
            assert deviation == pytest.approx(values[method].std(), abs=0.051), (method, cell)


def test_targets_with_the_name_of_a_file_or_folder_run_anyway():
    makefile = (ROOT / "Makefile").read_text()
    always = set(re.search(r"^\.PHONY:(.*)$", makefile, flags=re.MULTILINE)[1].split())
    targets = {
        target for target in re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE) if (ROOT / target).exists()
    }
    assert "docs" in targets
    assert targets <= always
