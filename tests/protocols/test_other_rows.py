"""Rows of tables from other models than CLIP, and from recipes of several stages."""

from __future__ import annotations

import pytest

from peft_ncgeo.protocols import base_to_new
from peft_ncgeo.training import Recipe

from ..conftest import tiny_clip, tiny_images, tiny_processor
from ..models.survey.inputs import processor_for
from ..models.survey.tries import specs
from .test_protocols import ARGS, SIX, one_cell

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def test_a_folder_of_another_dual_encoder(tmp_path):
    spec = next(spec for spec in specs() if spec.name == "SiglipModel")
    model, processor = spec.build(), processor_for(spec)
    model.save_pretrained(tmp_path / "siglip")
    processor.save_pretrained(tmp_path / "siglip")
    lora = Recipe.from_dict("lora", {"peft": {"LoraConfig": {"target_modules": ["q_proj"]}}, "args": ARGS})
    sources = {"folder": str(tmp_path / "siglip"), "function": spec.build}
    (named,), (made,) = (
        one_cell(tmp_path / name, lora, model=source, processor=processor) for name, source in sources.items()
    )
    assert named["test"] == made["test"]
    assert named["loss/ce"] == pytest.approx(made["loss/ce"])


def test_a_recipe_of_stages_is_a_row_like_any_other(tmp_path):
    stages = [{"peft": {"LNTuningConfig": {"target_modules": ["layer_norm1"]}}}, {"rows": "texts"}]
    short = [stages[0], {"rows": "texts", "args": {"max_steps": 1}}]

    def go(folder, stages):
        recipe = Recipe.from_dict("staged", {"stages": stages, "args": {**ARGS, "learning_rate": 0.05}})
        sets = tiny_images(120, SIX), tiny_images(18, SIX, 1)
        return base_to_new([recipe], *sets, tiny_clip, tiny_processor(), tmp_path / folder, seeds=(1,)).rows[0]

    row, other = go("one", stages), go("two", stages)
    assert row["seconds"] > 0
    norms = [m.weight for name, m in tiny_clip().named_modules() if name.endswith("layer_norm1")]
    assert row["trainable"] == 2 * sum(map(len, norms)) + 3 * tiny_clip().config.projection_dim  # and a row a class
    assert [row[name] for name in ("base", "new", "H")] == [other[name] for name in ("base", "new", "H")]
    assert not list((tmp_path / "one").rglob("class_rows.safetensors")), "what is trained is not kept"
    with pytest.raises(ValueError, match="staged"):
        go("one", short)
