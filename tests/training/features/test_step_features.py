"""Nothing is computed twice, and nothing changes by it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import get_worker_info
from torch.utils.flop_counter import FlopCounterMode

from peft_ncgeo import NPTConfig
from peft_ncgeo.data.images import ImageCollator, LabelledImages
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.training.features.views import FixedViews, never_changes

from ...conftest import CHECKPOINTING, NAMES, tiny_clip, tiny_images, tiny_processor
from ..runs import Gradients, Pointwise, lora_clip, lora_vit, prompted_clip, trainer, vit, weights

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]


def text_only():
    torch.manual_seed(3)
    return get_peft_model(tiny_clip(), NPTConfig.coop(num_text_tokens=4, text_init=[6, 7, 8, 6]))


def count_passes(run) -> dict[str, list[int]]:
    """Batch sizes of the towers' passes with gradient and without."""
    seen: dict[str, list[int]] = {"image": [], "frozen image": [], "text": [], "frozen text": []}
    model = run.model.get_base_model()

    def note(kind):
        return lambda module, args, kwargs: seen[kind if torch.is_grad_enabled() else f"frozen {kind}"].append(1)

    model.vision_model.register_forward_pre_hook(note("image"), with_kwargs=True)
    model.text_model.register_forward_pre_hook(note("text"), with_kwargs=True)
    return seen


def never_ahead(run):
    run.features.look_ahead = lambda *args: None
    return run


@pytest.mark.parametrize("build", [prompted_clip, lora_clip, vit])
def test_frozen_images_are_seen_once_and_training_is_the_same(tmp_path, build):
    results = []
    for ahead in (True, False):
        losses = [Pointwise(weight=0.3)] if build is vit else [OTPreservation(weight=2.0), Pointwise(weight=0.3)]
        run = trainer(tmp_path, build(), losses, num_train_epochs=3)
        run = run if ahead else never_ahead(run)
        run.train()
        assert (run.features.frozen_views is not None) == ahead
        assert run.features.student_views is None
        results.append((weights(run.model), [row["loss"] for row in run.state.log_history if "loss" in row]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-6, rtol=1e-4)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_frozen_passes_are_as_many_as_views_need(tmp_path):
    run = trainer(tmp_path, losses=[OTPreservation(weight=2.0)], num_train_epochs=3)  # 32 images, 4 steps an epoch
    seen = count_passes(run)
    run.train()
    assert len(seen["frozen image"]) == 4  # eight at a time, as it evaluates
    assert len(seen["frozen text"]) == 1
    assert len(seen["image"]) == 12 + 1  # and a look whether the image tower changes
    short = trainer(tmp_path, losses=[OTPreservation(weight=2.0)], max_steps=4)
    seen = count_passes(short)
    short.train()
    assert len(seen["frozen image"]) == 4  # one epoch: each is seen once anyway, step by step
    assert short.features.frozen_views is None


def test_texts_alone_are_tuned_on_features_of_images_that_nobody_decodes(tmp_path, monkeypatch):
    results, decoded, sample = [], [], LabelledImages._sample
    monkeypatch.setattr(LabelledImages, "_sample", lambda *args: decoded.append(1) or sample(*args))
    for ahead in (True, False):
        run = trainer(tmp_path, text_only(), [OTPreservation(weight=1.0)], num_train_epochs=4)
        run = run if ahead else never_ahead(run)
        decoded.clear()
        run.train()
        assert len(decoded) == (1 + 2 * 32 if ahead else 4 * 32)  # for the student and for the frozen model
        results.append(weights(run.model))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-4)


def test_evaluation_still_decodes(tmp_path):
    run = trainer(tmp_path, text_only(), eval_dataset=tiny_images(9, NAMES), num_train_epochs=3, eval_strategy="epoch")
    run.train()
    assert run.features.student_views is not None
    last = [row for row in run.state.log_history if "eval_accuracy" in row][-1]
    assert run.evaluate()["eval_accuracy"] == last["eval_accuracy"]


def test_own_transforms_and_new_views_are_not_kept(tmp_path):
    images = tiny_images(32)
    drawn = images.with_transform(lambda rows: rows)
    for data, options in ((drawn, {}), (images, {"augmentation": "crop_flip"})):
        run = trainer(tmp_path, losses=[OTPreservation(weight=2.0)], train=data, num_train_epochs=3, **options)
        run.train()
        assert run.features.frozen_views is None


def test_views_drawn_beforehand_come_again(tmp_path):
    options = {"augmentation": "crop_flip", "num_views": 2, "num_train_epochs": 4}
    run = trainer(tmp_path, losses=[OTPreservation(weight=2.0)], **options)
    run.train()
    assert run.features.frozen_views.features.shape == (64, 24)
    images = run.get_train_dataloader().dataset
    shown = []
    for epoch in range(4):
        images.set_epoch(epoch)
        shown.append(images[5])
    assert [sample["view"] for sample in shown] == [10, 11, 10, 11]
    assert shown[0]["image"].tobytes() == shown[2]["image"].tobytes() != shown[1]["image"].tobytes()
    assert images.fixed_view(11)["image"].tobytes() == shown[1]["image"].tobytes()
    assert images[5, 1]["view"] == 10  # drawn twice in an epoch: the next view
    with pytest.raises(ValueError, match="num_views=-1 must.*whole.*least 0"):
        trainer(tmp_path, num_views=-1)


def test_every_view_belongs_to_one_process():
    images = LabelledImages(tiny_images(7), "image", "label", lambda image, rng: image, num_views=3)
    numbers = [number for rank in range(2) for number in FixedViews(images, rank, 2).numbers]
    assert sorted(numbers) == list(range(21))


def test_resumed_training_is_bit_equal(tmp_path):
    losses = lambda: [OTPreservation(budget=0.02)]  # noqa: E731
    whole = trainer(tmp_path / "a", losses=losses(), num_train_epochs=3, save_strategy="steps", save_steps=5)
    whole.train()
    again = trainer(tmp_path / "b", losses=losses(), num_train_epochs=3)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert again.features.frozen_views is not None
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value)


@pytest.mark.parametrize("build", [prompted_clip, text_only, lora_clip])
def test_texts_are_read_once_an_optimiser_step(tmp_path, build):
    """Point-wise terms: four micro-batches of 2 are one batch of 8."""
    results = []
    for size in (8, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 3}
        run = trainer(tmp_path, build(), [Pointwise(weight=0.5)], **options)
        seen = count_passes(run)
        run.train()
        assert len(seen["text"]) == 3
        assert run.features.step_text is None
        results.append(weights(run.model))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-3)


def test_text_flops_do_not_grow_with_accumulation(tmp_path):
    counts = []
    for parts in (1, 4):
        options = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 1}
        run = trainer(tmp_path, prompted_clip(), **options)
        with FlopCounterMode(display=False) as counter:
            run.train()
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


def test_what_never_changes():
    pixels = torch.randn(1, 3, 16, 16)
    for build, expected in ((text_only, True), (prompted_clip, False), (lora_clip, False)):
        model = build().train()
        assert never_changes(
            model, {"image_features": model.get_image_features(pixel_values=pixels).pooler_output}
        ) == (expected)
    model = text_only().train()
    model.get_base_model().config.vision_config.attention_dropout = 0.1
    features = {"image_features": model.get_image_features(pixel_values=pixels).pooler_output}
    assert not never_changes(model, features)
    lora = get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)).eval()
    with torch.no_grad():
        features = {"image_features": lora.get_image_features(pixel_values=pixels).pooler_output}
    assert not never_changes(lora, features)


@pytest.mark.parametrize("first_layer", [1, 2])
def test_backward_stops_at_the_first_prompt_also_under_checkpointing(tmp_path, first_layer):
    """Checkpointing adds one more forward pass of the layers from there on, and nothing to the backward pass."""
    config = NPTConfig(num_text_tokens=2, num_vision_tokens=2, text_depth=1, vision_depth=1, first_layer=first_layer)

    def flops(**options) -> tuple[int, int]:
        """Of all, and of the plain products, which the backward pass alone computes."""
        torch.manual_seed(0)
        run = trainer(tmp_path, get_peft_model(tiny_clip(), config), max_steps=1, **options)
        with FlopCounterMode(display=False) as counter:
            run.train()
        return counter.get_total_flops(), counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    (plain, backward), (checkpointed, again) = flops(), flops(**{CHECKPOINTING: True})
    whole, _ = flops(**{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}})
    assert again == backward > 0
    assert plain < checkpointed < 1.35 * plain
    assert checkpointed < whole  # by how much depends on whether Transformers asks for gradients of the inputs


class Workers(ImageCollator):
    """A collator that refuses batches outside of worker processes, but for one sample that is looked at before."""

    def __call__(self, samples):
        assert len(samples) == 1 or get_worker_info() is not None
        return super().__call__(samples)


def test_images_read_by_workers_give_the_same(tmp_path):
    """Views that are encoded once, batches that are trained on, predictions and what a card tells."""
    found, told = [], []
    for workers in (0, 2):
        options = {"augmentation": "crop_flip", "num_views": 2, "num_train_epochs": 4, "num_test_views": 5}
        run = trainer(tmp_path, losses=[Pointwise(weight=1.0)], dataloader_num_workers=workers, **options)
        if workers:
            run.data_collator = Workers(tiny_processor().image_processor)
        run.train()
        assert run.features.frozen_views is not None
        measured = run.measure(tiny_images(9, seed=2))
        told.append(measured.summary.compute(measured.text_features))
        predicted = run.predict(tiny_images(11, seed=1)).predictions
        found.append((weights(run.model), run.features.frozen_views.features, predicted))
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)
    assert told[1] == told[0]


@pytest.mark.parametrize("make", [lora_vit, vit, lora_clip], ids=["LoRA", "prompts", "texts too"])
def test_reentrant_checkpointing_reaches_all_adapters(tmp_path, make):
    """Also those of an image classifier, whose pixels require no gradient."""
    found = []
    for reentrant in (False, True):
        options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
        gradients = Gradients()
        run = trainer(tmp_path, make(), max_steps=1, **options)
        run.add_callback(gradients)
        run.train()
        found.append(gradients.steps[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
