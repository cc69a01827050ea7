"""Exports give the tuned model's probabilities in a process that has neither this package nor PEFT."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from peft_ncgeo import CoPAConfig, NPTConfig, ZeroShotClassifier, adapt
from peft_ncgeo.classifiers.exported_classifier import ExportedClassifier
from peft_ncgeo.hub import export_classifier
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, TEXT, VISION, pixels, tiny, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..states import changes, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*all of them get prompts"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:.*do not hold this adapter's placeholders"),
    pytest.mark.slow,
]
IMAGES = tiny_images(6)["image"][:]
PHRASE = [6, 7]
LORA = partial(LoraConfig, target_modules=["q_proj", "fc1", "visual_projection"], r=3)


def tuned(config, base=tiny_clip, active=True, **names):
    """A model whose adapter is far from its start."""
    torch.manual_seed(1)
    model = get_peft_model(base(), config, **names)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    if not active:
        model.base_model.disable_adapter_layers()
    return model.eval()


def npt(base=tiny_clip, active=True, **fields):
    fields = {"num_text_tokens": 2, "num_vision_tokens": 3, "text_init": PHRASE, "text_depth": 2, **fields}
    return tuned(NPTConfig(**fields), base, active)


def maple(**fields):
    return tuned(NPTConfig.maple(text_init=PHRASE, **fields))


def lora_below_prompts():
    with_lora = tuned(LORA(), adapter_name="low_rank").get_base_model()
    return tuned(NPTConfig(num_vision_tokens=2, vision_depth=2), lambda: with_lora, adapter_name="prompts")


def merged_lora(active=True):
    model = tuned(LORA())
    model.merge_adapter()
    if not active:
        model.base_model.disable_adapter_layers()
    return model


def other_projection_in_the_vision_config():
    config = CLIPConfig(text_config=TEXT, vision_config={**VISION, "projection_dim": 99}, projection_dim=24)
    return tiny(CLIPModel, config)


MODELS = {
    "plain": tiny_clip,
    "plain-other_projection": other_projection_in_the_vision_config,
    "npt": partial(npt, vision_depth=3),
    "npt-all_layers": partial(npt, vision_depth=12, text_depth=12),
    "npt-first_layer": partial(npt, vision_depth=2, first_layer=1),
    "npt-text": partial(npt, num_vision_tokens=0),
    "npt-vision": partial(npt, num_text_tokens=0, text_init=None, vision_depth=2),
    "npt-off": partial(npt, active=False),
    "npt-bfloat16": partial(npt, base=lambda: tiny_clip().to(torch.bfloat16)),
    "npt-float64": partial(npt, base=lambda: tiny_clip().double()),
    "coupled": partial(maple, text_depth=3, vision_depth=2),
    "coupled-first_layer": partial(maple, text_depth=2, vision_depth=2, first_layer=1),
    "lora": partial(tuned, LORA()),
    "lora-off": partial(tuned, LORA(), active=False),
    "lora-dora": partial(tuned, LORA(use_dora=True)),
    "lora-merged": merged_lora,
    "lora-merged-off": partial(merged_lora, active=False),
    "lora-below-npt": lora_below_prompts,
    "copa-off": partial(tuned, CoPAConfig(residual_adapters=True), active=False),
    "modules_to_save": partial(
        tuned, LoraConfig(target_modules=["q_proj"], modules_to_save=["visual_projection", "post_layernorm"])
    ),
}
BASE_AGAIN = {name for name in MODELS if name.endswith("-off") or name.startswith("plain")}
READ = """
import sys

sys.modules["peft"] = sys.modules["peft_ncgeo"] = None  # importing them raises
import torch
from pathlib import Path
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPVisionModelWithProjection, pipeline

root = Path(sys.argv[1])
files = sorted((root / "images").iterdir())
images = [Image.open(file) for file in files]
found = {}
for folder in sorted((root / "exports").iterdir()):
    pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found[folder.name] = model(**pixels).logits.softmax(-1)
    if folder.name == "lora":  # without vision prompts, what transformers itself has is enough
        with torch.no_grad():
            tower = CLIPVisionModelWithProjection.from_pretrained(folder)
            embeds = torch.nn.functional.normalize(tower(**pixels).image_embeds, dim=-1)
            found["stock"] = (model.logit_scale.exp() * embeds @ model.text_features.T).softmax(-1)

folder = root / "exports" / "npt"
sys.path.insert(0, str(folder))
from exported_classifier import ExportedClassifier

with torch.no_grad():
    found["imported"] = ExportedClassifier.from_pretrained(folder)(**pixels).logits.softmax(-1)
answers = pipeline("image-classification", model=str(folder), trust_remote_code=True)([str(f) for f in files], top_k=5)
names = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).config.id2label
scores = [{answer["label"]: answer["score"] for answer in one} for one in answers]
found["pipeline"] = torch.tensor([[one[names[k]] for k in range(5)] for one in scores])
save_file(found, root / "found.safetensors")
"""


def probabilities(model) -> torch.Tensor:
    return ZeroShotClassifier(model, tiny_processor()).predict_proba(IMAGES, NAMES)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def expected(root) -> dict[str, torch.Tensor]:
    found = {}
    for name, build in MODELS.items():
        model = build()
        found[name] = probabilities(model)
        folder = export_classifier(model, NAMES, root / "exports" / name, tiny_processor())
        assert folder == root / "exports" / name
    return found


@pytest.fixture(scope="module")
def found(root, expected) -> dict[str, torch.Tensor]:
    (root / "images").mkdir()
    for i, image in enumerate(IMAGES):
        image.save(root / "images" / f"{i}.png")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(root)], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return load_file(root / "found.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_export_equals_the_model(name, expected, found):
    torch.testing.assert_close(found[name].float(), expected[name], atol=1e-5, rtol=0)
    moved = (expected[name] - expected["plain"]).abs().max()
    assert moved < 1e-5 if name in BASE_AGAIN else moved > 1e-3, moved


@pytest.mark.parametrize(("way", "name"), [("imported", "npt"), ("pipeline", "npt"), ("stock", "lora")])
def test_other_ways_to_read_it(way, name, expected, found):
    torch.testing.assert_close(found[way], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_files_hold_tensors_and_text_only(name, root, expected):
    names = ["README.md", "config.json", "exported_classifier.py", "model.safetensors", "preprocessor_config.json"]
    files = [path for path in (root / "exports" / name).iterdir() if path.is_file()]  # Python may keep bytecode there
    assert sorted(file.name for file in files) == names
    for file in files:
        assert b"peft" not in file.read_bytes().lower()


def test_tensors_are_the_tower_and_the_texts(root, expected):
    tensors = load_file(root / "exports" / "coupled" / "model.safetensors")
    plain = {k: v for k, v in tiny_clip().state_dict().items() if k.startswith(("vision_model", "visual_projection"))}
    assert tensors.keys() - plain.keys() == {"prompts.0", "prompts.1", "text_features", "logit_scale"}
    assert all(torch.equal(tensors[name], value) for name, value in plain.items())
    torch.testing.assert_close(tensors["text_features"].norm(dim=-1), torch.ones(5))
    half = load_file(root / "exports" / "npt-bfloat16" / "model.safetensors")
    wide = {name for name, value in half.items() if value.dtype == torch.float32}
    assert wide == {"text_features", "logit_scale"}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_an_export_can_be_cast(root, cast):
    """Its cosines are multiplied by a hundred, so the texts and the scale keep their precision."""
    exported = ExportedClassifier.from_pretrained(root / "exports" / "npt").eval()
    seen = pixels(4)
    with torch.no_grad():
        expected = exported(seen).logits.softmax(-1)
        wide = exported.text_features.clone()
        found = getattr(exported, cast)()(seen).logits
    assert next(exported.parameters()).dtype == getattr(torch, {"half": "float16"}.get(cast, cast))
    assert torch.equal(exported.text_features.float(), wide)
    torch.testing.assert_close(found.softmax(-1).float(), expected, atol=0.03, rtol=0)


def test_no_path_of_this_machine_is_written(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "base")
    base = CLIPModel.from_pretrained(tmp_path / "base")
    folder = export_classifier(npt(lambda: base), NAMES, tmp_path / "new" / "export", tiny_processor(), "the {}.")
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    assert 'written as "the {}."' in (folder / "README.md").read_text()
    assert [p.name for p in folder.parent.iterdir()] == ["export"]


def aligned_lora():
    model = tuned(LORA())
    align_classifier(model, tiny_images(10), 0.5, tiny_processor())
    return model


def few_shot_clip():
    model = tuned(CoPAConfig())
    adapt(model, IMAGES, [0, 1] * 3, steps=1, processor=tiny_processor().image_processor)
    model.base_model.disable_adapter_layers()
    return model


LEFT = {name: MODELS[name] for name in ("plain", "coupled", "lora-merged", "lora-dora", "modules_to_save")}
LEFT |= {"below": lora_below_prompts, "aligned": aligned_lora, "few-shot": few_shot_clip}


@pytest.mark.parametrize("name", LEFT)
def test_the_model_is_left_as_it_was(tmp_path, name):
    """Every tensor, what of them is trained, and every module's mode: after an export, and after a refused one."""
    model = LEFT[name]()
    for parameter in list(model.parameters())[::3]:
        parameter.requires_grad_(not parameter.requires_grad)
    list(model.modules())[7].train()
    before, random = state(model), torch.get_rng_state()
    export_classifier(model, NAMES, tmp_path / "export", tiny_processor())
    assert torch.equal(torch.get_rng_state(), random)
    assert changes(before, state(model)) == []
    with pytest.raises(ValueError, match="name"):
        export_classifier(model, ["owl", ""], tmp_path / "refused", tiny_processor())
    assert changes(before, state(model)) == []


def broken():
    model = npt()
    next(p for n, p in model.named_parameters() if "vision_model" in n and p.requires_grad).data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("build", "names", "message"),
    [
        (npt, NAMES[:1], "at least two class names"),
        (npt, [*NAMES, NAMES[0]], "Duplicate class names"),
        (npt, [*NAMES, " ".join(["cat"] * 20)], "would be cut off"),
        (tiny_vit_classifier, NAMES, "ViTForImageClassification reads no text, .* save_pretrained"),
        (partial(tuned, CoPAConfig()), NAMES, "has a .*copa.layer.CoPALayer, which cannot be merged"),
        (partial(tuned, PolyConfig(target_modules=r"vision_model.*q_proj", r=2)), NAMES, "has a peft.tuners.poly.*"),
        (broken, NAMES, "prompts.0 is not finite"),
    ],
)
def test_errors_leave_nothing_behind(tmp_path, build, names, message):
    with pytest.raises(ValueError, match=message):
        export_classifier(build(), names, tmp_path / "new" / "export", tiny_processor())
    assert list(tmp_path.iterdir()) == []


def test_a_processor_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.*class names.*CLIPProcessor"):
        export_classifier(npt(), NAMES, tmp_path, tiny_processor().image_processor)


def test_what_fails_halfway_leaves_nothing_behind(tmp_path, monkeypatch):
    processor = tiny_processor()

    def full(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(processor.image_processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_classifier(tiny_clip(), NAMES, tmp_path / "export", processor)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="exists.*not empty.*name"):
        export_classifier(tiny_clip(), NAMES, tmp_path, tiny_processor())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def exported(model, pixel_values):
    batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(model, (pixel_values,), dynamic_shapes=batch, strict=False).module()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of Transformers, which compares image sizes
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["npt", "npt-first_layer", "coupled", "lora"])
@pytest.mark.parametrize("trace", [exported, partial(torch.jit.trace, strict=False)], ids=["export", "jit"])
@torch.no_grad()
def test_it_is_traced_for_any_number_of_images(name, trace, root, expected):
    model = ExportedClassifier.from_pretrained(root / "exports" / name).eval()
    traced = trace(model, pixels(3))
    for images in (1, 3, 7):
        logits = traced(pixels(images, seed=images))["logits"]
        torch.testing.assert_close(logits, model(pixels(images, seed=images)).logits, atol=1e-5, rtol=1e-5)
