"""The examples' README: scripts and paths exist, numbers are those of docs, blocks run and are the recipe files'."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_ncgeo import adapt
from peft_ncgeo.losses import CrossEntropy
from peft_ncgeo.training import Recipe

from ..docs.pages import README, table

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TEXT = (EXAMPLES / "README.md").read_text()
ADVICE = TEXT.split("\n## Which method when\n")[1].split("\n## ")[0]
WHOLE = {"methods": "base_to_new", "tails": "image_tail"}  # table -> page that a script writes as a whole
INDEX = TEXT.split("\n## Paper index\n")[1]
TABLES = ("demo", "methods", "transport", "alignment", "tails", "prototypes", "copa")
VALUE = r"[+-]?\d+\.\d+(?: ± \d+\.\d+)?"
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
# a recipe's name, its block, and the paragraph with the lines that are quoted
QUOTED = re.findall(
    r"`(examples/recipes/[\w/]+\.yaml)`:\n\n```python\n(.*?)```\n\nLines (\d+)-(\d+): (.*?)\n\n",
    TEXT,
    flags=re.DOTALL,
)
PROMPTS = ("coop", "vpt", "ivlp", "maple", "promptsrc", "prompt_ot", "npt_v1", "npt_v2", "cpt", "budget")
BY_HAND = {"CoPA", "TSA", "URL"}  # whose settings are arguments of `adapt`

# ---------------------------------------------------------------------------------------------- scripts and paths


def rows(text: str) -> list[list[str]]:
    """Cells of the lines that are rows of a table."""
    lines = re.findall(r"^\|(.*)\|$", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_every_script_is_listed():
    listed = {name for cells in rows(TEXT) for name in re.findall(r"examples/(\w+\.py)`?", cells[0])}
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"own_images.py"}
    assert listed == scripts
    assert "`examples/own_images.py` is no script" in TEXT


def test_paths_exist():
    """Links are followed in `tests/docs`."""
    paths = set(re.findall(r"(?:examples|hub_cards)/[\w/.-]*\w", TEXT))
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing


def test_image_folders_are_taken_where_the_tables_say_so():
    taken = {}
    for cells in rows(TEXT):
        for name in re.findall(r"examples/(\w+\.py)", cells[0]):
            taken[name] = set(re.findall(r"--\w+", cells[-1])) if len(cells) == 4 else set()
    common = (ROOT / "peft_ncgeo" / "protocols" / "command_line.py").read_text()
    for name, arguments in taken.items():
        code = (EXAMPLES / name).read_text()
        protocol = common if "protocol_parser" in code else ""
        for argument in arguments:
            declared = rf'"{argument}"|^    {argument[2:]}: str \| None = field'
            assert re.search(declared, code + protocol, flags=re.MULTILINE), (name, argument)
        takes_one = re.search(r'^    dataset_name: str|"--dataset_name"', code, flags=re.MULTILINE)
        assert ("--dataset_name" in arguments) == bool(takes_one), name
    first_cell = (EXAMPLES / "walkthrough.py").read_text().split("\n# %% [markdown]")[0]
    assert re.search(r"^images_folder = .*train/<class>/", first_cell, flags=re.MULTILINE)


# ------------------------------------------------------------------------------------------- numbers of the results


def find_tables() -> dict[str, list[tuple[tuple[str, ...], list[list[str]]]]]:
    """The results' tables by the mark around them; some are told apart by the heading or note over or under them."""
    found = {}
    for name in TABLES:
        block = (ROOT / "docs" / "results" / f"{WHOLE[name]}.md").read_text() if name in WHOLE else table(name)
        parts: list[tuple[tuple[str, ...], str]] = [((), block)]
        if name == "tails":
            _, *pieces = re.split("^##+ (.*)\n", block, flags=re.MULTILINE)
            parts = [((key,), text) for key, text in zip(pieces[::2], pieces[1::2], strict=True)]
        if name == "copa":
            note = r"^((?:resnet|vit|clip), [\w-]+) episodes"
            first, others = block.split("<summary>Other backbones")
            parts = [(tuple(re.findall(note, first, flags=re.MULTILINE)), first)]
            pieces = re.split(note, others, flags=re.MULTILINE)[1:]
            parts += [((key,), text) for key, text in zip(pieces[::2], pieces[1::2], strict=True)]
        found[name] = [
            (keys, rows(chunk))
            for keys, text in parts
            for chunk in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
        ]
    return found


RESULTS = find_tables()


def look_up(place: str, row: str, column: str | None = None) -> str:
    """The one cell of the results that `table / key / .. / column` and a row's name stand for."""
    name, *keys = place.split(" / ")
    column = keys.pop() if column is None else column
    found = [
        cells[header.index(column, 1)]
        for more, (header, _, *body) in RESULTS[name]
        if column in header[1:]
        for cells in body
        if {row, *keys} <= {*more, header[0], *cells}
    ]
    assert len(found) == 1, (place, row, column, found)
    return found[0]


def test_tables_of_numbers_are_those_of_the_results():
    captioned = re.findall(r"\*([^*\n]+)\*:\n\n((?:^\|.*\n)+)", ADVICE, flags=re.MULTILINE)
    assert len(captioned) >= 10
    for place, text in captioned:
        header, _, *body = rows(text)
        for name, *cells in body:
            for column, cell in zip(header[1:], cells, strict=True):
                assert cell == look_up(place, name, column), (place, name, column)


def test_numbers_in_sentences_are_those_of_the_results():
    prose = " ".join(line for line in ADVICE.splitlines() if not line.startswith("|"))
    prose = re.sub(r"\s+", " ", prose)
    quoted = re.findall(rf"\*([\w]+ / [^*]+)\*: ((?:`[^`]+` {VALUE}(?:, | and )?)+)", prose)
    assert len(quoted) >= 8
    for place, items in quoted:
        for row, value in re.findall(rf"`([^`]+)` ({VALUE})", items):
            assert value == look_up(place, row), (place, row)
        prose = prose.replace(items, "")
    # no other number with decimals than these settings of a run
    assert set(re.findall(r"\d+\.\d+", re.sub(r"\([^)]*\)|`[^`]*`", "", prose))) <= {"0.1"}


def test_what_the_sentences_make_of_the_numbers():
    def mean(place: str, row: str) -> float:
        return float(look_up(place, row).split(" ± ")[0])

    tails, prompts = ("tau=1", "tau=0.25", "tau=0.06", "IF 10", "IF 50", "IF 100"), list(PROMPTS)
    kept = dict.fromkeys(prompts, 0)
    for tail in tails:  # "in five of the six settings it does not lose on new classes; no other in more than two"
        untuned = mean(f"methods / {tail} / new", "zero-shot")
        for name in prompts:
            kept[name] += mean(f"methods / {tail} / new", name) >= untuned
    assert kept.pop("budget") == 5
    assert max(kept.values()) == 2
    for tail in tails[3:]:  # "worse than the untuned model from IF 10 on"
        worse = {
            name for name in prompts if mean(f"methods / H / {tail}", name) < mean("methods / H / tau=1", "zero-shot")
        }
        assert worse == set(prompts) - {"promptsrc", "prompt_ot", "budget"}
    for tail in tails[1:4]:  # "first on the three mild tails"
        assert max(prompts, key=lambda name, tail=tail: mean(f"methods / H / {tail}", name)) == "prompt_ot"
    changes = {}
    for name in prompts:  # "changes least between the tails"
        values = [mean(f"methods / H / {tail}", name) for tail in tails[1:]]
        changes[name] = max(values) - min(values)
    assert min(changes, key=changes.get) == "budget"
    without = ("ce", "etf", "minority_margin")
    balanced = ("balanced_softmax", "logit_adjustment", "lift", "spa_post_hoc", "budget")
    for tail in ("IF 50", "IF 100"):  # "a balanced loss matters most"
        for adapter in ("lora", "prompts"):
            found = {name: mean(f"tails / {tail} / all / {adapter}", name) for name in (*without, *balanced)}
            assert max(found[name] for name in without) < min(found[name] for name in balanced)
    best = {}
    for tail in ("IF 10", "IF 50", "IF 100"):  # "the highest mean at"
        names = ("ldam", *balanced, "spa_reg", "spa_slerp", "spa_proj", *without)
        best[tail] = max(names, key=lambda name, tail=tail: mean(f"tails / {tail} / all / lora", name))
    assert best == {"IF 10": "budget", "IF 50": "budget", "IF 100": "spa_post_hoc"}
    for adapter in ("lora", "prompts"):  # "ahead of every aligned cross-entropy", "by more than half a point"
        balanced = mean(f"alignment / {adapter}, all / plain", "balanced softmax")
        for turn in ("Reg", "SLERP", "Proj", "post-hoc"):
            place = f"alignment / {adapter}, all / {turn}"
            assert mean(f"alignment / {adapter}, all / plain", "CE") + mean(place, "CE") < balanced
            assert abs(mean(place, "balanced softmax")) <= 0.5


# ------------------------------------------------------------------------------------------------- blocks and recipes


def run(block: str) -> dict:
    names: dict = {}
    exec(compile(block, "examples/README.md", "exec"), names)
    return names


def fields(part: object) -> dict:
    """The settings of a config, a loss or a callback."""
    if hasattr(part, "to_dict"):
        return part.to_dict()
    if part is None:
        return {}
    inner = set(vars(nn.Module()))
    return {name: v for name, v in vars(part).items() if name not in inner and name[0] != "_" and name != "metrics"}


def same(ours: object, recipes: object) -> None:
    assert type(ours) is type(recipes)
    assert fields(ours) == fields(recipes)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_blocks_run(block):
    assert set(run(block)) - {"__builtins__"}


def test_every_recipe_has_its_block():
    recipes = {str(path.relative_to(ROOT)) for path in (EXAMPLES / "recipes").glob("*.yaml")}
    recipes |= {str(path.relative_to(ROOT)) for path in (EXAMPLES / "recipes" / "images").glob("*.yaml")}
    assert {path for path, *_ in QUOTED} == recipes
    assert len(QUOTED) == len(recipes)


@pytest.mark.parametrize(("path", "block", "first", "last", "text"), QUOTED, ids=[quote[0] for quote in QUOTED])
def test_block_and_quoted_lines_are_the_recipes(path, block, first, last, text):
    names, whole = run(block), Recipe.read(ROOT / path)
    recipe = whole.stages[0] if whole.stages else whole
    same(names["config"], recipe.config())
    for kind in ("losses", "callbacks"):
        found = getattr(recipe, kind)()
        assert len(names.get(kind, [])) == len(found)
        for ours, theirs in zip(names.get(kind, []), found, strict=True):
            same(ours, theirs)
    same(names.get("classification_loss", CrossEntropy()), recipe.classification_loss())

    lines = (ROOT / path).read_text().splitlines()
    named = [line.split("#")[0] for line in lines[int(first) - 1 : int(last)]]
    pairs = re.findall(r"`(\w+: [^`]+)`", re.split(r"Our\s+reading", text)[0])
    for pair in pairs:
        assert any(re.search(rf"(^|[ {{]){re.escape(pair)}\s*($|[,}}])", line) for line in named), pair
    settings = {pair.split(":")[0] for pair in pairs}
    parts = [whole, *whole.stages]
    assert {name for part in parts for name in part.args} - {"frozen_templates"} <= settings  # none is left out
    assert all(f"rows: {part.rows}" in pairs for part in parts if part.rows)
    marked = [i for i, line in enumerate(lines, 1) if "our reading" in line]
    section = next(part for part in re.split(r"\n#### ", INDEX) if f"`{path}`" in part and block in part)
    assert not marked or "Our reading" in " ".join(section.split())


def test_single_lines_named_use_logit_adjustment():
    named = re.findall(r"`(examples/recipes/[^`]+)`\s+\(line (\d+)\)", TEXT)
    assert len(named) == 2
    for path, line in named:
        assert "LogitAdjustment" in (ROOT / path).read_text().splitlines()[int(line) - 1]


def sections() -> dict[str, str]:
    parts = re.split(r"^#### (.*)$", INDEX, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_settings_are_arguments_of_adapt(name):
    (block,) = re.findall(r"```python\n(.*?)```", sections()[name], flags=re.DOTALL)
    names, parameters = run(block), inspect.signature(adapt).parameters
    assert set(names["settings"]) <= set(parameters)
    if name == "URL":  # the example's row
        code = (EXAMPLES / "adapt_copa.py").read_text()
        assert names["settings"] == {"steps": 40, "weight_decay": 0.0, "optimizer": torch.optim.Adadelta, "lr": 0.1}
        assert 'URL = {"steps": 40, "weight_decay": 0.0, "optimizer": torch.optim.Adadelta}' in code
        assert 'FewShotMethod("URL", {"shared": True}, {**URL, "lr": 0.1})' in code
    else:
        assert all(parameters[key].default == value for key, value in names["settings"].items())


# ------------------------------------------------------------------------------------------------------------ papers

ARXIV = r"\b(?:0[7-9]|1\d|2\d)(?:0[1-9]|1[0-2])\.\d{5}\b"


def test_every_paper_that_the_package_cites_is_in_the_index():
    package = ROOT / "peft_ncgeo"
    files = [path for part in ("losses", "tuners", "training", "geometry") for path in (package / part).rglob("*.py")]
    cited = {number for path in files for number in re.findall(ARXIV, path.read_text())}
    pages = (README, ROOT / "docs" / "papers.md", ROOT / "docs" / "methods" / "README.md")
    cited |= {number for page in pages for number in re.findall(ARXIV, page.read_text())}
    linked = set(re.findall(rf"https://arxiv\.org/abs/({ARXIV})", INDEX))
    assert len(cited) >= 15
    assert cited <= linked
    assert set(re.findall(ARXIV, TEXT)) == linked


def test_every_method_has_title_link_and_block():
    for name, text in sections().items():
        assert "```python" in text or name == "Also cited", name
        if name != "Ours":
            assert re.search(r"^(?:- |[\w ]+: )?\*[^*]{10,}\*", text.strip()), name
            assert "https://arxiv.org/abs/" in text, name
