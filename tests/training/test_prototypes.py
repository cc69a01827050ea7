"""Training with prototypes: alone, and over another PEFT method."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from peft_ncgeo import NPTConfig, PrototypeConfig
from peft_ncgeo.geometry import gram_distance
from peft_ncgeo.losses import CrossEntropy, PrototypeSupCon
from peft_ncgeo.models.heads import linear_classifier
from peft_ncgeo.training import GeometryMonitor

from ..classifiers.test_aligned import tiny_resnet
from ..conftest import tiny_images, tiny_vit_classifier
from ..losses.batches import unit_rows
from .runs import pixels_and_labels, prototypes, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*for a second time", "ignore:Already found a `peft_config`")


def lora_under_prototypes(build=tiny_vit_classifier, target=("q_proj", "v_proj"), **fields):
    torch.manual_seed(3)
    model = build()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(target)), model, adapter_name="lora")
    return get_peft_model(model, PrototypeConfig(**{"projection_dim": 16, **fields}))


def supcon_run(folder, model, **options):
    return trainer(folder, model, [PrototypeSupCon()], classify=False, **options)


def test_copies_and_temperature_are_the_configs(tmp_path):
    """The loss that the trainer logs is that of a loss told the same by hand."""
    seen = []
    for loss in (PrototypeSupCon(), PrototypeSupCon(copies=7, temperature=0.3), PrototypeSupCon(copies=8)):
        model = prototypes(prototypes_per_class=7, temperature=0.3)
        run = trainer(tmp_path, model, [loss], classify=False, max_steps=2)
        run.train()
        seen.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


@pytest.mark.parametrize("trainable", [False, True])
def test_prototypes_stay_or_move(trainable, tmp_path):
    model = prototypes(trainable=trainable)
    before = linear_classifier(model).weight.detach().clone()
    supcon_run(tmp_path, model).train()
    after = linear_classifier(model).weight.detach()
    assert torch.equal(after, before) != trainable
    torch.testing.assert_close(after.norm(dim=1), torch.ones(5))


def test_cross_entropy_trains_the_same_head(tmp_path):
    options = {"classification_loss": CrossEntropy(), "eval_dataset": tiny_images(20), "learning_rate": 0.005}
    run = trainer(tmp_path, prototypes(), **options)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_monitor_compares_embeddings_with_prototypes(tmp_path):
    monitor, images = GeometryMonitor(), tiny_images(20, seed=1)
    run = supcon_run(tmp_path, prototypes(), eval_dataset=images, callbacks=[monitor])
    run.train()
    metrics = run.evaluate()
    pixels, labels = pixels_and_labels(images)
    with torch.no_grad():
        out = run.extractor.eval()(pixel_values=pixels)
    h, labels = out["image_features"].double(), torch.tensor(labels)
    torch.testing.assert_close(h.norm(dim=1), torch.ones(20, dtype=torch.float64))
    means = torch.stack([h[labels == c].mean(0) for c in range(5)])
    prototypes_ = linear_classifier(run.model).weight.double()
    assert metrics["eval_gram_distance"] == pytest.approx(float(gram_distance(means, prototypes_)), rel=1e-5)
    centred = means - means.mean(0)
    cosines = (unit_rows(centred) * prototypes_).sum(1)
    assert metrics["eval_alignment"] == pytest.approx(float(cosines.mean()), rel=1e-5)
    torch.testing.assert_close(monitor.per_class["alignment"], cosines, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(monitor.class_means, means, atol=1e-6, rtol=1e-5)
    # the error exponents of each class, pair by pair
    expected = []
    for c in range(5):
        pairs = [prototypes_[c] - prototypes_[k] for k in range(5) if k != c]
        expected.append(min(max(float(d @ means[c]), 0) ** 2 / float(2 * d @ d) for d in pairs))
    assert monitor.per_class["error_exponent"].tolist() == pytest.approx(expected, abs=1e-6)
    assert metrics["eval_error_exponent"] == pytest.approx(min(expected), abs=1e-6)
    assert metrics["eval_class_exponent"] == pytest.approx(sum(expected) / 5, rel=1e-4)
    best = min(float((means[a] - means[b]).square().sum()) / 8 for a in range(5) for b in range(a))
    assert metrics["eval_exponent_ratio"] == pytest.approx(min(expected) / best, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "target"), [(tiny_vit_classifier, ("q_proj", "v_proj")), (tiny_resnet, ("convolution",))]
)
def test_lora_below_is_trained_and_resumed(build, target, tmp_path):
    """Both adapters are in every checkpoint; a resumed run ends where the uninterrupted one does."""
    whole = supcon_run(tmp_path / "whole", lora_under_prototypes(build, target))
    before = weights(whole.model)
    whole.train()
    after = weights(whole.model)
    assert {"lora" in name for name in after} == {True, False}
    assert all(not torch.equal(after[name], before[name]) for name in after)
    options = {"save_strategy": "steps", "save_steps": 3}
    supcon_run(tmp_path / "parts", lora_under_prototypes(build, target), **options).train()
    resumed = supcon_run(tmp_path / "parts", lora_under_prototypes(build, target))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert weights(resumed.model).keys() == after.keys()
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, after[name]), name


def test_frozen_batch_norms_keep_their_statistics(tmp_path):
    """An adapter's file does not hold them, so training must not move them; trained ones move as ever."""
    model = lora_under_prototypes(tiny_resnet, ("convolution",))
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    assert before
    supcon_run(tmp_path, model).train()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name
    whole = tiny_resnet()
    trainer(tmp_path, whole, classification_loss=CrossEntropy(), learning_rate=0.001).train()
    assert any(
        not torch.equal(value, before["base_model.model." + name.replace("convolution", "convolution.base_layer")])
        for name, value in whole.state_dict().items()
        if "running_mean" in name
    )


def test_the_best_model_is_the_best_of_both_adapters(tmp_path):
    """LoRA's weights too are those of the best step, which is not the last."""

    class Falling(GeometryMonitor):
        def compute(self, text, head=None):
            self.calls = getattr(self, "calls", 0) + 1
            return {"score": -float(self.calls)}  # the first evaluation is the best

    run = supcon_run(
        tmp_path,
        lora_under_prototypes(),
        eval_dataset=tiny_images(10),
        callbacks=[Falling()],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = [load_file(tmp_path / "checkpoint-2" / part / "adapter_model.safetensors") for part in (".", "lora")]
    for name, value in weights(run.model).items():
        key = name.replace(".default", "").replace(".lora.weight", ".weight")
        assert torch.equal(value, next(part[key] for part in saved if key in part)), name


def test_names_that_clash_and_prompts_below_are_refused():
    model = tiny_vit_classifier()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match="named 'default' too"):
        get_peft_model(model, PrototypeConfig())
    model = tiny_vit_classifier()
    inject_adapter_in_model(NPTConfig.vpt(vision_depth=2), model, adapter_name="npt")
    with pytest.raises(ValueError, match="would be switched off"):
        get_peft_model(model, PrototypeConfig())


def test_a_loss_follows_the_active_head(tmp_path):
    """Copies and temperature are read again when training starts, and by a second trainer."""
    loss = PrototypeSupCon()
    model = prototypes(prototypes_per_class=3, temperature=0.5)
    model.add_adapter("other", PrototypeConfig(projection_dim=16, prototypes_per_class=9, temperature=0.2))
    run = trainer(tmp_path, model, [loss], classify=False, max_steps=1)
    assert (loss._setting("copies"), loss._setting("temperature")) == (3, 0.5)
    model.set_adapter("other")
    run.train()
    assert (loss._setting("copies"), loss._setting("temperature")) == (9, 0.2)
    trainer(tmp_path, prototypes(prototypes_per_class=4), [loss], classify=False)
    assert loss._setting("copies") == 4
