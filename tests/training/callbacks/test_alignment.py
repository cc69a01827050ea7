"""Space alignment while training: class means, the callbacks, and what they are given."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ncgeo.losses import LDAM, CrossEntropy, SpaceAlignment
from peft_ncgeo.training import GeometryMonitor, GradientProjection, SlerpAlignment, align_classifier
from peft_ncgeo.training.state.class_means import ClassMeans
from peft_ncgeo.training.state.text_gradient import TextGradient

from ...cases import MODELS
from ...classifiers.test_aligned import resnet
from ...conftest import tiny_images, tiny_processor, tiny_vit_classifier
from ...losses.batches import unit_rows
from ..runs import lora_vit, prompted_clip, prototypes, trainer, vit, weights

pytestmark = pytest.mark.slow


def test_class_means_are_an_average_of_batch_means():
    """The first value of a class as it is, then 0.9 old + 0.1 new; other classes stay."""
    generator = torch.Generator().manual_seed(0)
    tracker, expected = ClassMeans(4), torch.full((4, 3), math.nan, dtype=torch.float64)
    for labels in ([0, 0, 1], [1, 2, 2], [0, 1, 1], [2, 2, 2]):
        labels = torch.tensor(labels)
        features = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        seen = tracker.update(features, labels)
        for c in labels.unique():
            mean = features.detach()[labels == c].mean(0)
            expected[c] = mean if expected[c].isnan().any() else 0.9 * expected[c] + 0.1 * mean
        torch.testing.assert_close(seen.detach(), expected, equal_nan=True)
        tracker.end_step()
        torch.testing.assert_close(tracker.means, expected, equal_nan=True)
        assert not tracker.means.requires_grad
    assert tracker.means[3].isnan().all()


def test_features_get_a_tenth_of_the_gradient():
    tracker = ClassMeans(2)
    tracker.update(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))
    tracker.end_step()
    features = torch.randn(4, 3, requires_grad=True)
    tracker.update(features, torch.tensor([0, 0, 0, 1]))[0].sum().backward()
    torch.testing.assert_close(features.grad, torch.tensor([[0.1 / 3] * 3] * 3 + [[0.0] * 3]))


def test_micro_batches_count_as_one_batch():
    features, labels = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 1, 0, 0])
    whole, parts = ClassMeans(3), ClassMeans(3)
    for tracker in (whole, parts):
        tracker.update(features + 1, labels)
        tracker.end_step()
    expected = whole.update(features, labels)
    for half in (slice(0, 4), slice(4, 8)):
        seen = parts.update(features[half], labels[half])
    torch.testing.assert_close(seen, expected)
    whole.end_step()
    parts.end_step()
    torch.testing.assert_close(parts.means, whole.means)


def test_non_finite_features_leave_the_means_alone():
    tracker = ClassMeans(2)
    tracker.update(torch.ones(2, 3), torch.tensor([0, 1]))
    tracker.end_step()
    with pytest.raises(ValueError, match="image_features has non-finite"):
        tracker.update(torch.full((2, 3), math.nan), torch.tensor([0, 1]))
    assert torch.equal(tracker.means, torch.ones(2, 3))


class Recorder(GradientProjection):
    """Notes what goes in and out of a projection."""

    def __init__(self, gamma=0.6):
        super().__init__(gamma)
        self.seen = []

    def project(self, gradient, weights):
        projected = super().project(gradient, weights)
        self.seen.append((gradient.clone(), weights.detach().clone(), self._means.means.clone(), projected.clone()))
        return projected


def by_hand(gradient, weight, means, gamma):
    """SpA-Proj, row by row in float64."""
    gradient, weight, means = gradient.double(), weight.double(), means.double()
    present = ~means.isnan().any(1)
    mu = means - means[present].mean(0)
    out = gradient.clone()
    for c in present.nonzero().flatten():
        w, m, g = unit_rows(weight[c]), unit_rows(mu[c]), gradient[c]
        tangential = g - (g @ w) * w
        d = unit_rows(m - (m @ w) * w)
        if tangential @ d > 0:
            tangential = tangential - (tangential @ d) * d
        out[c] = (1 - gamma) * tangential + gamma * g
    return out


@pytest.mark.parametrize("build", [lora_vit, prompted_clip])
def test_projection_of_the_whole_gradient(build, tmp_path):
    """Four micro-batches of 2: once a step, the formula on their summed gradient; gamma=1 is no projection."""
    recorder, away = Recorder(), lambda: [SpaceAlignment(weight=-5.0)]  # which the projection has to work against
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    run = trainer(tmp_path, build(), away(), callbacks=[recorder], **small)
    run.train()
    assert len(recorder.seen) == 3
    for gradient, weight, means, projected in recorder.seen:
        torch.testing.assert_close(projected.double(), by_hand(gradient, weight, means, 0.6), atol=1e-6, rtol=1e-4)
        assert not torch.allclose(projected, gradient)
    plain = trainer(tmp_path, build(), away(), **small)
    same = trainer(tmp_path, build(), away(), callbacks=[Recorder(1)], **small)
    plain.train()
    same.train()
    torch.testing.assert_close(weights(same.model), weights(plain.model), atol=1e-6, rtol=1e-4)
    # the means are those of one batch of 8
    whole = Recorder()
    trainer(tmp_path, build(), callbacks=[whole], max_steps=1).train()
    torch.testing.assert_close(whole.seen[0][2], recorder.seen[0][2], atol=1e-6, rtol=1e-4, equal_nan=True)


def test_slerp_rotates_the_head_after_each_step(tmp_path):
    """With a learning rate of 0 the rows only rotate: by 1 - exp(-34), so onto their means; lengths stay."""
    callback = SlerpAlignment(threshold=1.0)
    run = trainer(tmp_path, lora_vit(), callbacks=[callback], learning_rate=0.0, num_train_epochs=20)
    head = run.model.base_model.model.classifier.modules_to_save["default"]
    before = head.weight.detach().clone()
    run.train()
    means = run.class_means.means
    mu = unit_rows(means - means.mean(0))
    torch.testing.assert_close(head.weight.norm(dim=1), before.norm(dim=1))
    assert ((unit_rows(before) * mu).sum(1) < 0.9).any()
    # the means still move by a tenth of a batch a step, and the weights follow one step behind
    assert ((unit_rows(head.weight.detach()) * mu).sum(1) > 0.995).all()


def test_slerp_leaves_rows_above_the_threshold_alone(tmp_path):
    run = trainer(tmp_path, lora_vit(), callbacks=[SlerpAlignment(threshold=-1.0)], learning_rate=0.0)
    head = run.model.base_model.model.classifier.modules_to_save["default"]
    before = head.weight.detach().clone()
    run.train()
    assert torch.equal(head.weight, before)


def aligned(tmp_path, weight, **options):
    losses = [] if weight is None else [SpaceAlignment(weight=weight)]
    run = trainer(tmp_path, lora_vit(), losses, callbacks=[GeometryMonitor()], eval_dataset=tiny_images(32), **options)
    run.train()
    return run.evaluate()["eval_alignment"]


def test_reg_aligns_and_negative_reg_misaligns(tmp_path):
    plain, reg, negative = (aligned(tmp_path, w, num_train_epochs=5, learning_rate=0.003) for w in (None, 2.0, -2.0))
    assert reg > plain + 0.05
    assert negative < plain - 0.05


def test_slerp_takes_the_step_of_its_time(tmp_path):
    """At learning rate 0 the head after each step is the one before, rotated by the fraction of t = 0..T-1."""

    class Spy(SlerpAlignment):
        def on_optimizer_step(self, args, state, control, **kwargs):
            before, means = self._head.weight.detach().clone(), self._means.means.clone()
            super().on_optimizer_step(args, state, control, **kwargs)
            seen.append((before, means, self._head.weight.detach().clone()))

    seen = []
    callback = Spy(alpha=1e-4, threshold=1.0)
    trainer(tmp_path, lora_vit(), callbacks=[callback], learning_rate=0.0).train()
    steps = len(seen)
    assert steps == 8
    for t, (before, means, after) in enumerate(seen):
        ramp = (1 - math.cos(math.pi * t / steps)) / 2
        fraction = 1 - (1 - 1e-4 * ramp) ** (34000 / steps)
        present = ~means.isnan().any(1)
        assert torch.equal(after[~present], before[~present])
        before, means, after = before[present].double(), means[present].double(), after[present].double()
        w, mu = unit_rows(before), unit_rows(means - means.mean(0))
        angle = (w * mu).sum(1, keepdim=True).acos()
        turned = (((1 - fraction) * angle).sin() * w + (fraction * angle).sin() * mu) / angle.sin()
        torch.testing.assert_close(after, turned * before.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-4)
    assert torch.equal(seen[0][0], seen[0][2])
    assert not torch.allclose(seen[-1][0], seen[-1][2], atol=1e-3)


def test_a_class_that_was_never_seen_keeps_its_row():
    """The head's weights of such a class get no gradient from alignment and are not rotated."""
    tracker = ClassMeans(5)
    tracker.update(torch.randn(4, 32), torch.tensor([0, 1, 2, 3]))
    tracker.end_step()
    head = torch.nn.Linear(32, 5)
    projection, slerp = GradientProjection(), SlerpAlignment(alpha=1.0, threshold=1.0)
    for callback in (projection, slerp):
        callback.bind(head, tracker, reads_text=False)
    before, gradient = head.weight.detach().clone(), torch.randn(5, 32)
    assert torch.equal(projection.project(gradient, head.weight)[4], gradient[4])
    slerp.on_optimizer_step(None, SimpleNamespace(global_step=1, max_steps=2), None)
    assert torch.equal(head.weight[4], before[4])
    assert not torch.allclose(head.weight[:4], before[:4])


def test_projection_leaves_student_templates_alone():
    """Their rows follow the classes' and pass as they are; nothing passes before the last micro-batch."""
    texts = torch.randn(6, 4, requires_grad=True)
    gradient = TextGradient([lambda g, t: g * 2 + t], classes=2)
    for is_last in (False, True):
        gradient.watch(texts, is_last).mul(torch.arange(6.0)[:, None]).sum().backward()
        if not is_last:
            assert texts.grad is None
    expected = 2 * torch.arange(6.0)[:, None].expand(6, 4).clone()  # two micro-batches
    expected[:2] = 2 * expected[:2] + texts.detach()[:2]
    torch.testing.assert_close(texts.grad, expected)


def test_callbacks_need_the_trainer_that_keeps_means(tmp_path):
    for callback in (SlerpAlignment(), GradientProjection()):
        with pytest.raises(ValueError, match="needs GeometryTrainer"):
            callback.on_train_begin(None, None, None)


def test_a_callback_serves_two_trainers_and_two_runs(tmp_path):
    """The second run's result is that of a fresh callback."""
    callback = SlerpAlignment(alpha=2e-5)
    trainer(tmp_path, lora_vit(), callbacks=[callback, GradientProjection()], seed=1).train()
    used, fresh = (
        trainer(tmp_path, lora_vit(), callbacks=[c, GradientProjection()]) for c in (callback, SlerpAlignment(2e-5))
    )
    used.train()
    fresh.train()
    for name, value in weights(fresh.model).items():
        assert torch.equal(weights(used.model)[name], value), name
    used.train()  # goes on from there
    assert all(math.isfinite(float(value.sum())) for value in weights(used.model).values())


def test_resnet_heads_are_rotated(tmp_path):
    run = trainer(
        tmp_path, resnet(), callbacks=[SlerpAlignment(threshold=1.0), GradientProjection()], num_train_epochs=4
    )
    run.train()
    means = run.class_means.means
    head = run.model.get_base_model().classifier.modules_to_save["default"][1].weight
    cosines = (unit_rows(head.detach()) * unit_rows(means - means.mean(0))).sum(1)
    assert cosines.mean() > 0.9


def test_a_term_that_moves_nothing_is_warned_of(tmp_path):
    run = trainer(tmp_path, prompted_clip(num_text_tokens=0), [SpaceAlignment(weight=1.0)], max_steps=1)
    with pytest.warns(UserWarning, match="space_alignment moves nothing"):
        run.train()


def test_state_of_another_number_of_classes_is_refused():
    with pytest.raises(RuntimeError, match="it.*3 classes.*2"):
        ClassMeans(2).load_state_dict({"means": torch.zeros(3, 4)})


@pytest.mark.parametrize(
    ("build", "callback", "message"),
    [
        (lambda: vit(LoraConfig(r=2, target_modules=["q_proj"])), SlerpAlignment, "not one trained linear layer"),
        (lambda: vit(LoraConfig(r=2, target_modules=["classifier"])), GradientProjection, "not one trained linear"),
        (prototypes, SlerpAlignment, "not one trained linear layer"),
        (prompted_clip, SlerpAlignment, "Rotate them after training"),
    ],
)
def test_callbacks_that_have_nothing_to_change_are_refused(build, callback, message, tmp_path):
    run = trainer(tmp_path, build(), callbacks=[callback()])
    with pytest.raises(ValueError, match=message):
        run.train()


def test_projection_of_untrained_texts_is_refused(tmp_path):
    run = trainer(tmp_path, prompted_clip(num_text_tokens=0), callbacks=[GradientProjection()])
    with pytest.raises(ValueError, match="no text parameter is trained"):
        run.train()


def test_alignment_of_a_frozen_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="frozen; train the head"):
        trainer(tmp_path, vit(LoraConfig(r=2, target_modules=["q_proj"])), [SpaceAlignment(weight=1.0)])
    run = trainer(
        tmp_path, vit(LoraConfig(r=2, target_modules=["q_proj"])), [SpaceAlignment(weight=1.0, detach_means=False)]
    )
    run.train()
    with pytest.raises(ValueError, match="not one linear layer"):
        trainer(tmp_path, vit(LoraConfig(r=2, target_modules=["classifier"])), [SpaceAlignment(weight=1.0)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlerpAlignment(alpha=1.5), "alpha=1.5"),
        (lambda: SlerpAlignment(threshold=2), "threshold=2"),
        (lambda: GradientProjection(gamma=-0.1), "gamma=-0.1"),
        (lambda: LDAM(reweight_after=1.1), "reweight_after=1.1"),
        (lambda: LDAM(beta=1.0), "beta=1.0"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_full_model_trains_with_every_alignment(tmp_path):
    """No adapter at all: the head is a plain layer."""
    run = trainer(
        tmp_path,
        tiny_vit_classifier(),
        [SpaceAlignment(weight=1.0)],
        callbacks=[SlerpAlignment(), GradientProjection(), GeometryMonitor()],
        classification_loss=CrossEntropy(),
        learning_rate=0.001,
    )
    run.train()
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)


def aligned_run(folder, **options):
    return trainer(
        folder,
        lora_vit(),
        [SpaceAlignment(weight=0.5, detach_means=False)],
        callbacks=[SlerpAlignment(alpha=2e-5), GradientProjection()],
        classification_loss=LDAM(max_margin=0.1, reweight_after=0.5),
        augmentation="crop_flip",
        **options,
    )


def test_resumed_equals_uninterrupted(tmp_path):
    """The class means are part of a checkpoint: without them the resumed run would end elsewhere."""
    whole = aligned_run(tmp_path / "whole")
    whole.train()
    aligned_run(tmp_path / "parts", save_strategy="steps", save_steps=3).train()
    resumed = aligned_run(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name
    assert torch.equal(resumed.class_means.means, whole.class_means.means)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_other_image_models_are_aligned(name, tmp_path):
    """DINOv2 and CLIP's vision tower keep their head elsewhere than ViT, and pool in other ways."""
    build = MODELS[f"{name}_classifier"]
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(build(), lora)
    callbacks = [SlerpAlignment(threshold=1.0), GradientProjection(), GeometryMonitor()]
    images = tiny_images(32)
    run = trainer(tmp_path, model, [SpaceAlignment(weight=0.5)], callbacks=callbacks, eval_dataset=images)
    before = run.evaluate()["eval_alignment"]
    run.train()
    assert run.evaluate()["eval_alignment"] > max(0.8, before)
    aligned = align_classifier(run.model, images, 1.0, tiny_processor())
    assert aligned.cosine_after == pytest.approx(1.0)
