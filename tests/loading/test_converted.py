"""Checkpoints in the layouts of CoOp, IVLP / PromptSRC / Prompt-OT and MaPLe, written here from known prompts."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model

from peft_ncgeo import NPTConfig
from peft_ncgeo.hub import import_prompts
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.text_encoder import text_features

from ..conftest import pixels, texts, tiny_clip


def tuned(config: NPTConfig):
    torch.manual_seed(3)
    model = get_peft_model(tiny_clip(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # representable in half precision, as published files are
                parameter.copy_((parameter + torch.randn_like(parameter) * 0.3).half().float())
    return model


def prompt(model, path: str) -> torch.Tensor:
    return dict(model.named_parameters())[f"base_model.model.{path}"].detach().half().clone()


def coop(model) -> dict[str, torch.Tensor]:
    ctx = prompt(model, "text_model.embeddings.ncgeo_npt_prompt.default")
    return {"ctx": ctx, "token_prefix": torch.zeros(3, 1, 32), "token_suffix": torch.zeros(3, 9, 32)}


def ivlp(model) -> dict[str, torch.Tensor]:
    state = {f"prompt_learner.{key}": value for key, value in coop(model).items()}
    state["logit_scale"] = torch.tensor(4.6)
    state["image_encoder.class_embedding"] = torch.zeros(40)  # the whole model is in the file
    state["image_encoder.VPT"] = prompt(model, "vision_model.embeddings.ncgeo_npt_prompt.default")
    for encoder, tower, depth in (("text_encoder", "text_model", 2), ("image_encoder", "vision_model", 3)):
        for i in range(1, depth):
            path = f"{tower}.encoder.layers.{i}.ncgeo_npt_prompt.default"
            state[f"{encoder}.transformer.resblocks.{i}.VPT_shallow"] = prompt(model, path)
            state[f"{encoder}.transformer.resblocks.{i}.ln_1.weight"] = torch.ones(2)
    return state


def maple(model) -> dict[str, torch.Tensor]:
    state = {f"prompt_learner.{key}": value for key, value in coop(model).items()}
    for name in ("weight", "bias"):
        path = "vision_model.embeddings.ncgeo_npt_coupling.default"
        state[f"prompt_learner.proj.{name}"] = prompt(model, f"{path}.{name}")
        path = "vision_model.encoder.layers.1.ncgeo_npt_coupling.default"
        state[f"prompt_learner.compound_prompt_projections.0.{name}"] = prompt(model, f"{path}.{name}")
    deep = prompt(model, "text_model.encoder.layers.1.ncgeo_npt_prompt.default")
    state["prompt_learner.compound_prompts_text.0"] = deep
    return state


CASES = {
    "coop": (NPTConfig.coop(num_text_tokens=6), coop),
    "ivlp": (NPTConfig.ivlp(text_init=[6], text_depth=2, vision_depth=3), ivlp),
    "maple": (NPTConfig.maple(text_init=[6], text_depth=2, vision_depth=2), maple),
}


def write(path, state) -> str:
    torch.save({"state_dict": state, "epoch": 5, "optimizer": {"state": {}}, "val_result": None}, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("format", CASES)
@pytest.mark.parametrize("auto", [False, True])
def test_a_published_checkpoint_becomes_an_adapter(tmp_path, format, auto):
    config, layout = CASES[format]
    model = tuned(config)
    imported = import_prompts(write(tmp_path / "model.pth.tar-5", layout(model)), format=format)
    for field in ("num_text_tokens", "num_vision_tokens", "text_depth", "coupling"):
        assert getattr(imported.config, field) == getattr(config, field), field
    tiny_clip().save_pretrained(tmp_path / "base")
    imported.save_pretrained(tmp_path / "adapter", str(tmp_path / "base"))
    if auto:
        loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    else:
        loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path / "adapter").eval()
    inputs = texts(6)
    torch.testing.assert_close(text_features(loaded, **inputs), text_features(model, **inputs), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(encode_images(loaded, pixels()), encode_images(model, pixels()), atol=2e-6, rtol=1e-5)


def test_refusals(tmp_path):
    state = coop(tuned(CASES["coop"][0]))
    path = write(tmp_path / "coop.pth.tar", state)
    with pytest.raises(ValueError, match="format='cocoop' must.*one"):
        import_prompts(path, format="cocoop")
    for format in ("ivlp", "maple"):
        with pytest.raises(ValueError, match=f"holds no prompts.*'{format}'"):
            import_prompts(path, format=format)
    write(tmp_path / "csc.pth.tar", {**state, "ctx": torch.zeros(3, 6, 32)})
    with pytest.raises(ValueError, match=r"has a context for each class \(CSC\)"):
        import_prompts(tmp_path / "csc.pth.tar", format="coop")
    write(tmp_path / "other.pth.tar", {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="holds no prompts.*'coop'"):
        import_prompts(tmp_path / "other.pth.tar", format="coop")
    (tmp_path / "broken.pth.tar").write_bytes(b"nothing")
    for name in ("broken.pth.tar", "missing.pth.tar"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
            import_prompts(tmp_path / name, format="coop")


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    torch.save({"state_dict": {"ctx": torch.zeros(2, 32)}, "extra": Harmful()}, tmp_path / "bad.pth.tar")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        import_prompts(tmp_path / "bad.pth.tar", format="coop")
    assert "executed" not in capsys.readouterr().out
