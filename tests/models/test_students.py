"""A student of a teacher's texts: its logits, the statistics of its batch norm, files, export, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from peft_ncgeo import CoPAConfig, ImageClassifier, NPTConfig
from peft_ncgeo.hub import export_classifier, load_adapter, save_adapter
from peft_ncgeo.losses import Distillation
from peft_ncgeo.models.batch_norm import SharedBatchNorm, rows_that_count
from peft_ncgeo.models.towers import find_pooling

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit
from ..training.runs import larger_clip, student_of, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def with_statistics(model, seed: int = 4):
    """Give all that an adapter holds, and the batch norm, values far from their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if ".modules_to_save." in name or "prompt" in name:
                tensor.add_(1 if tensor.dtype == torch.int64 else 0.5 * torch.rand_like(tensor))
    return model.eval()


def by_hand(student, clip, teacher, x):
    """s cos(projector(f), g), with the projector written out."""
    projector = student.get_base_model().projector.modules_to_save["default"]
    first, norm, _, last = projector
    f = clip.get_image_features(pixel_values=x).pooler_output
    h = f @ first.weight.T + first.bias
    h = (h - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    f = h.clamp_min(0) @ last.weight.T + last.bias
    texts = tiny_processor().tokenizer([f"a photo of a {n}." for n in NAMES], padding=True, return_tensors="pt")
    g = teacher.get_text_features(**texts).pooler_output
    return teacher.logit_scale.exp() * F.cosine_similarity(f[:, None], g[None], dim=-1)


def test_logits_are_cosines_with_the_teachers_texts():
    teacher, clip, x = larger_clip(), tiny_clip(), pixels()
    torch.manual_seed(0)
    base = ImageClassifier.from_backbone(
        clip, NAMES, head="cosine", init="texts", teacher=teacher, processor=tiny_processor()
    )
    config = NPTConfig(num_text_tokens=0, num_vision_tokens=1, modules_to_save=["projector"])
    student = with_statistics(get_peft_model(base, config))
    for module in student.modules():  # without the prompts, the image feature is the model's own
        if hasattr(module, "active_tokens"):
            module._disable_adapters = True
    with torch.no_grad():
        torch.testing.assert_close(student(pixel_values=x).logits, by_hand(student, clip, teacher, x))
    assert base.config.scale == pytest.approx(teacher.logit_scale.exp().item())
    assert base.projector.modules_to_save["default"][3].out_features == 28
    given = ImageClassifier.from_backbone(
        clip, NAMES, head="cosine", init="texts", teacher=teacher, processor=tiny_processor(), scale=100.0
    )
    assert given.config.scale == 100


def test_trained_values_on_vit_b16_shapes():
    """Prompts of nine layers, and two linear layers with a batch norm between."""
    text = {"hidden_size": 512, "num_hidden_layers": 1, "vocab_size": 10}
    vision = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "num_attention_heads": 12}
    teacher = larger_clip(width=768)
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
    base = ImageClassifier.from_backbone(
        clip.to_empty(device="cpu"), NAMES, head="cosine", init="texts", teacher=teacher, processor=tiny_processor()
    )
    config = NPTConfig(num_text_tokens=0, num_vision_tokens=4, vision_depth=9, modules_to_save=["projector"])
    model = get_peft_model(base, config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 9 * 4 * 768 + (512 * 768 + 768) + 2 * 768 + (768 * 768 + 768)


def test_the_shared_batch_norm_of_one_process_is_torchs():
    torch.manual_seed(0)
    own, other, x = SharedBatchNorm(5), nn.BatchNorm1d(5), torch.randn(7, 5)
    for _ in range(2):
        with rows_that_count(torch.ones(7, dtype=torch.bool)):
            torch.testing.assert_close(own(x), other(x))
    assert own.state_dict().keys() == other.state_dict().keys()
    torch.testing.assert_close(own.state_dict(), other.state_dict())
    torch.testing.assert_close(own.eval()(x), other.eval()(x))


def trained(tmp_path, dtype=torch.float32):
    """A student trained for a few steps, from a base in a folder; its adapter in another."""
    teacher = larger_clip()
    torch.manual_seed(2)
    base = ImageClassifier.from_backbone(
        tiny_clip().to(dtype), NAMES, head="cosine", init="texts", teacher=teacher, processor=tiny_processor()
    )
    base.save_pretrained(tmp_path / "base")
    base = ImageClassifier.from_pretrained(tmp_path / "base", dtype=dtype)
    config = NPTConfig(num_text_tokens=0, num_vision_tokens=4, vision_depth=3, modules_to_save=["projector"])
    run = trainer(
        tmp_path / "adapter",
        get_peft_model(base, config),
        [Distillation(weight=10.0)],
        train=tiny_images(24).remove_columns("label"),
        class_names=NAMES,
        classify=False,
        teacher=teacher,
        eval_dataset=tiny_images(10),
    )
    run.train()
    run.save_model()
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_hold_the_statistics_of_the_batch_norm(tmp_path, dtype):
    run = trained(tmp_path, dtype)
    model, x = run.model.eval(), pixels().to(dtype)
    expected = {name: value for name, value in model.state_dict().items() if ".modules_to_save." in name}
    (count,) = (value for name, value in expected.items() if "num_batches" in name)
    assert int(count) == 6
    assert all(value.dtype in (torch.float32, torch.int64) for value in expected.values())
    native = PeftModel.from_pretrained(ImageClassifier.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    save_adapter(model, tmp_path / "pushed", tiny_processor(), record=run.record())
    own = load_adapter(tmp_path / "adapter")
    pushed = load_adapter(tmp_path / "pushed", ImageClassifier.from_pretrained(tmp_path / "base", dtype=dtype))
    for loaded in (native.eval(), own, pushed):
        state = loaded.state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, atol=0, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(pushed(pixel_values=x).logits, model(pixel_values=x).logits)
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "modules_to_save=['projector']" in card
    assert "PromptKD" in card


def test_the_frozen_projector_keeps_its_statistics(tmp_path):
    run = trained(tmp_path)
    original = run.model.get_base_model().projector.original_module
    assert torch.equal(original[1].running_mean, torch.zeros(28))
    assert int(original[1].num_batches_tracked) == 0


def test_a_model_for_others_has_the_feature_behind_the_projector():
    student = student_of(larger_clip()).get_base_model()
    assert find_pooling(student)[:2] == ("projector", 28)
    base = ImageClassifier.from_backbone(
        tiny_clip(), NAMES, head="cosine", init="texts", teacher=larger_clip(), processor=tiny_processor()
    )
    assert sum(p.numel() for p in get_peft_model(base, CoPAConfig()).parameters() if p.requires_grad) == 2 * 28 * 28


OUTSIDE = """
import sys
import torch
from transformers import pipeline
from PIL import Image
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True)
assert "peft_ncgeo" not in sys.modules and "peft" not in sys.modules
pixels = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(classify.model(pixel_values=pixels).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_an_export_needs_neither_package_nor_peft(tmp_path):
    student, x = with_statistics(student_of(larger_clip())), pixels()
    names = [NAMES[3], NAMES[0], NAMES[4]]  # some of its own, in any order
    export_classifier(student, names, tmp_path / "export", tiny_processor())
    torch.save(x, tmp_path / "tensor")
    command = [sys.executable, "-c", OUTSIDE, str(tmp_path / "export"), str(tmp_path / "tensor")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = student(pixel_values=x).logits[:, [3, 0, 4]]
    torch.testing.assert_close(torch.load(tmp_path / "tensor"), expected, atol=1e-5, rtol=1e-5)
    for wrong in (["a cat", NAMES[0]], NAMES[:1]):
        with pytest.raises(ValueError, match="class") as caught:
            export_classifier(student, wrong, tmp_path / "other", tiny_processor())
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "linear"}, "head='cosine'"),
        ({"init": "random"}, "init='texts'"),
        ({"teacher": tiny_vit()}, "ViTModel does not"),
        ({"processor": None}, "processor"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message):
    given = {"head": "cosine", "init": "texts", "teacher": larger_clip(), "processor": tiny_processor()}
    with pytest.raises(ValueError, match=message) as caught:
        ImageClassifier.from_backbone(tiny_clip(), NAMES, **{**given, **options})
    assert "\n" not in str(caught.value)


def test_a_batch_of_one_image_is_refused_before_training(tmp_path):
    options = {"train": tiny_images(17).remove_columns("label"), "class_names": NAMES, "classify": False}
    options |= {"teacher": larger_clip(), "losses": [Distillation(weight=1.0)]}
    with pytest.raises(ValueError, match="dataloader_drop_last") as caught:
        trainer(tmp_path, student_of(larger_clip()), **options).train()
    assert "\n" not in str(caught.value)
    trainer(tmp_path, student_of(larger_clip()), **options, dataloader_drop_last=True).train()


def test_every_micro_batch_has_its_own_statistics(tmp_path):
    """They count as steps of the running means."""
    counts = []
    for parts in (1, 2):
        options = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 3}
        student = student_of(larger_clip())
        trainer(tmp_path, student, [Distillation()], classify=False, teacher=larger_clip(), **options).train()
        counts.append(int(student.get_base_model().projector.modules_to_save["default"][1].num_batches_tracked))
    assert counts == [3, 6]
