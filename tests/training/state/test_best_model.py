"""The best model at the end of a training, whichever adapters the model has and whichever is active."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import load_peft_weights

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments

from ...conftest import tiny_clip, tiny_images, tiny_processor

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def lora(rank: int) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("adapters", "active"), [(["mine"], "mine"), (["default", "other"], "other"), (["default", "other"], "default")]
)
def test_the_best_weights_of_the_active_adapter(tmp_path, adapters, active):
    """Its weights at the end are those that the best checkpoint, here the first one, holds for it."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), lora(2), adapters[0])
    for rank, name in enumerate(adapters[1:], 3):
        model.add_adapter(name, lora(rank))
    model.set_adapter(active)
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    args = GeometryTrainingArguments(str(tmp_path), **every, **best, learning_rate=1.0, disable_tqdm=True)
    trainer = GeometryTrainer(model, args, tiny_images(30), tiny_images(10), tiny_processor())
    trainer.train()
    assert trainer.state.best_global_step < 3
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(f".{active}." in name for name in trained)
    found = model.state_dict()
    for name in adapters:
        folder = tmp_path / f"checkpoint-{trainer.state.best_global_step}" / (name if name != "default" else "")
        for key, value in load_peft_weights(str(folder), device="cpu").items():
            torch.testing.assert_close(found[key.replace(".weight", f".{name}.weight")], value, atol=0, rtol=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)
