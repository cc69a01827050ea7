"""A teacher that is another model: its logits, its own pixels, its cache, checkpoints, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, ImageClassifier, NPTConfig, ZeroShotClassifier
from peft_ncgeo.losses import Distillation, Regularizer
from peft_ncgeo.models.text_setting import TextSetting, remember_text_setting
from peft_ncgeo.training.features.teacher_model import TeacherModel

from ...conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..runs import larger_clip, other_processor, prompted_clip, student_of, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Seen(Regularizer):
    """A term that keeps the batches that it gets."""

    default_name = "seen"
    requires = ("teacher_logits",)
    reads_labels = False

    def __init__(self) -> None:
        super().__init__(weight=1.0)
        self.batches: list = []

    def forward(self, batch):
        self.batches.append(batch)
        return (batch.logits - batch.teacher_logits).square().mean()


def distilled(tmp_path, teacher=None, model=None, losses=None, **options):
    losses = [Distillation(weight=5.0)] if losses is None else losses
    return trainer(tmp_path, model, losses, classify=False, teacher=teacher or larger_clip(), **options)


def test_a_teacher_with_trained_rows_classifies_by_them(tmp_path):
    """As it predicts elsewhere; and a training does not resume with other rows."""
    teacher, processor = get_peft_model(tiny_clip(), LoraConfig(r=2, target_modules=["q_proj"])), tiny_processor()
    rows = torch.randn(len(NAMES), 24, generator=torch.Generator().manual_seed(1))
    remember_text_setting(teacher, TextSetting(None, tuple(NAMES), rows), ["default"])
    run = distilled(tmp_path, teacher.eval(), teacher_processor=processor)
    images = tiny_images(6)["image"][:]
    found = run.teacher.logits(**processor.image_processor(images=images, return_tensors="pt")).softmax(-1)
    torch.testing.assert_close(found, ZeroShotClassifier(teacher, processor).predict_proba(images, NAMES))
    before = run.teacher.state_dict()
    remember_text_setting(teacher, TextSetting(None, tuple(NAMES), rows + 1), ["default"])
    with pytest.raises(ValueError, match="another teacher"):
        run.teacher.load_state_dict(before)


def adapted(model):
    torch.manual_seed(8)
    config = NPTConfig(num_text_tokens=2, num_vision_tokens=2, text_depth=2, vision_depth=2, text_init=[6, 7])
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def by_hand(teacher, images, processor, prefix="a photo of a "):
    """exp(logit_scale) cos(f, g), by Transformers alone."""
    texts = processor.tokenizer([f"{prefix}{name}." for name in NAMES], padding=True, return_tensors="pt")
    pixels = processor.image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
    with torch.no_grad():
        f = teacher.get_image_features(**pixels).pooler_output
        g = teacher.get_text_features(**texts).pooler_output
    f, g = (x / x.norm(dim=-1, keepdim=True) for x in (f, g))
    return teacher.logit_scale.exp().detach() * f @ g.T


@pytest.mark.parametrize("epochs", [1, 3], ids=["step by step", "once for each view"])
@pytest.mark.parametrize("other", [False, True], ids=["the same pixels", "pixels of its own"])
def test_logits_are_the_teachers_own(tmp_path, epochs, other):
    teacher = larger_clip(image_size=24 if other else 16)
    processor, images, seen = other_processor() if other else tiny_processor(), tiny_images(16), Seen()
    options = {"train": images, "teacher_processor": processor, "num_train_epochs": epochs}
    run = distilled(tmp_path, teacher, losses=[seen], **options)
    assert (run.teacher.image_processor is None) != other
    run.train()
    assert (run.features.teacher_views is not None) == (epochs == 3)
    expected = by_hand(larger_clip(image_size=24 if other else 16), images["image"], processor)
    found = torch.cat([batch.teacher_logits for batch in seen.batches[:2]])  # an epoch, in another order
    order = torch.cdist(found, expected).argmin(1)
    assert sorted(order.tolist()) == list(range(16))
    torch.testing.assert_close(found, expected[order], atol=2e-5, rtol=1e-5)
    assert not found.requires_grad


def test_a_tuned_teacher_reads_names_as_its_adapter_does(tmp_path):
    teacher = adapted(tiny_clip())
    run = distilled(tmp_path, teacher)
    images = tiny_images(4)
    pixels = tiny_processor().image_processor(images=images["image"][:], return_tensors="pt")
    from_classifier = distilled(tmp_path, tiny_clip()).teacher.logits(**pixels)
    found = run.teacher.logits(**pixels)
    with torch.no_grad():
        f = teacher.get_image_features(**pixels).pooler_output
        g = teacher.get_text_features(**run.teacher.task.texts(NAMES)).pooler_output
    f, g = (x / x.norm(dim=-1, keepdim=True) for x in (f, g))
    torch.testing.assert_close(found, teacher.get_base_model().logit_scale.exp().detach() * f @ g.T)
    assert not torch.allclose(found, from_classifier, atol=1e-2)


def test_an_image_classifier_of_the_same_classes_teaches(tmp_path):
    teacher = ImageClassifier.from_backbone(larger_clip(), NAMES)
    images = tiny_images(4)
    pixels = tiny_processor().image_processor(images=images["image"][:], return_tensors="pt")
    with torch.no_grad():
        expected = teacher(**pixels).logits
    torch.testing.assert_close(distilled(tmp_path, teacher).teacher.logits(**pixels), expected)
    other = ImageClassifier.from_backbone(larger_clip(), NAMES[::-1])
    with pytest.raises(ValueError, match="another order"):
        distilled(tmp_path, other)


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
def test_logits_kept_for_each_view_train_the_same(tmp_path, augmentation):
    results = []
    for ahead in (True, False):
        options = {"num_train_epochs": 3, "augmentation": augmentation, "num_views": 1, "train": tiny_images(16)}
        run = distilled(tmp_path, larger_clip(image_size=24), teacher_processor=other_processor(), **options)
        if not ahead:
            run.features.look_ahead = lambda *args: None
        run.train()
        assert (run.features.teacher_views is not None) == ahead
        results.append(weights(run.model))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-4)


def test_nothing_of_the_teacher_is_trained_moved_or_saved(tmp_path):
    teacher = larger_clip().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    modes = [module.training for module in teacher.modules()]
    run = distilled(tmp_path, teacher, student_of(larger_clip()), save_strategy="epoch")
    run.train()
    run.save_model()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.grad is None for parameter in teacher.parameters())
    held = sum(file.stat().st_size for file in (tmp_path / "checkpoint-4").iterdir() if file.suffix == ".safetensors")
    assert held < 4 * 2 * sum(value.numel() for value in weights(run.model).values())


def test_the_student_learns_what_the_teacher_says(tmp_path):
    run = distilled(tmp_path, larger_clip(), student_of(larger_clip()), num_train_epochs=5)
    run.train()
    values = [row["loss/distillation"] for row in run.state.log_history if "loss/distillation" in row]
    assert values[-1] < 0.5 * values[0]


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    results = []
    for parts in (1, 4):
        options = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 3}
        run = distilled(tmp_path, **options)
        run.train()
        results.append(weights(run.model))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-3)


def test_resumed_is_uninterrupted(tmp_path):
    make = lambda out, **options: distilled(out, model=student_of(larger_clip()), num_train_epochs=3, **options)  # noqa: E731
    whole = make(tmp_path / "a", save_strategy="steps", save_steps=5)
    whole.train()
    again = make(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert any("running_var" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_resumed_training_has_the_same_teacher(tmp_path):
    distilled(tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=3).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    distilled(tmp_path / "b", max_steps=3).train(resume_from_checkpoint=checkpoint)
    for other in (larger_clip(seed=6), adapted(larger_clip())):
        with pytest.raises(ValueError, match="another teacher") as caught:
            distilled(tmp_path / "b", other, max_steps=3).train(resume_from_checkpoint=checkpoint)
        assert "\n" not in str(caught.value)


def test_bfloat16(tmp_path):
    run = distilled(tmp_path, larger_clip().bfloat16(), losses=[Seen()], bf16=True, max_steps=2)
    run.train()
    assert run.losses[0].batches[0].teacher_logits.dtype == torch.float32
    exact = by_hand(larger_clip(), tiny_images(4)["image"], tiny_processor())
    pixels = tiny_processor().image_processor(images=tiny_images(4)["image"][:], return_tensors="pt")
    torch.testing.assert_close(run.teacher.logits(**pixels), exact, atol=0.1, rtol=0)


def test_model_init_and_the_same_teacher(tmp_path):
    run = GeometryTrainer(
        model_init=lambda: prompted_clip(),
        args=GeometryTrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", disable_tqdm=True),
        train_dataset=tiny_images(8),
        processing_class=tiny_processor(),
        classification_loss=None,
        losses=[Distillation(weight=1.0)],
        teacher=larger_clip(),
        teacher_processor=tiny_processor(),
    )
    run.train()
    first = weights(run.model)
    run.train()
    torch.testing.assert_close(weights(run.model), first)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    def shared():
        model = tiny_clip()
        return {"model": get_peft_model(model, LoraConfig(target_modules=["q_proj"])), "teacher": model}

    cases = {
        "requires teacher_logits.*teacher": {"teacher": None, "teacher_processor": None, "raw": True},
        "teacher is given, but no loss": {"losses": [], "classify": True},
        "teacher must be a model": {"teacher": "openai/clip"},
        "shares trained parameters": shared(),
        "neither text features nor": {"teacher": tiny_vit_classifier().vit},
        "head has 5 outputs": {"teacher": tiny_vit_classifier(), "train": tiny_images(8, NAMES[:2])},
        "teacher_processor=5 ": {"teacher_processor": 5},
        "teacher_processor=CLIPImageProcessor": {"teacher_processor": tiny_processor().image_processor},
        "data_collator.*teacher": {"teacher_processor": other_processor(), "data_collator": lambda samples: {}},
    }
    for message, options in cases.items():
        given = {"model": prompted_clip(), "losses": [Distillation()], "teacher": larger_clip(), "classify": False}
        given |= {key: value for key, value in options.items() if key != "raw"}
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            trainer(tmp_path, **given)
        assert "\n" not in str(caught.value)


def test_the_processor_of_the_teacher_is_never_guessed(tmp_path):
    run = distilled(tmp_path)
    args = (run.task, NAMES, run.args)
    with pytest.raises(ValueError, match="teacher CLIPModel.*teacher_processor"):
        TeacherModel(larger_clip(), None, *args)
    larger_clip().save_pretrained(tmp_path / "teacher")
    other_processor().save_pretrained(tmp_path / "teacher")
    loaded = type(larger_clip()).from_pretrained(tmp_path / "teacher")
    assert TeacherModel(loaded, None, *args).image_processor.crop_size["height"] == 24
