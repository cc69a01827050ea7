"""Learned weights are float32 on a base in half precision: every step counts, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model

from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig, ZeroShotClassifier, adapt
from peft_ncgeo.classifiers.exported_classifier import ExportedClassifier
from peft_ncgeo.hub import export_classifier, load_adapter
from peft_ncgeo.models.heads import linear_classifier
from peft_ncgeo.training import SlerpAlignment

from ..classifiers.test_aligned import tiny_resnet
from ..conftest import NAMES, pixels, texts, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..training.runs import trainer, weights

HALVES = [torch.float16, torch.bfloat16]
ADAM = {"optim": "adamw_torch", "optim_args": None}
LORA = {"r": 2, "target_modules": ["q_proj"]}
HEADS = {
    "lora": lambda: LoraConfig(**LORA, modules_to_save=["classifier"]),
    "prompts": lambda: NPTConfig.vpt(vision_depth=2, modules_to_save=["classifier"]),
}
pytestmark = [pytest.mark.filterwarnings("ignore:No processor", "ignore:text_depth", "ignore:Slots"), pytest.mark.slow]


def head_on(dtype, config):
    torch.manual_seed(3)
    return get_peft_model(tiny_vit_classifier().to(dtype), config)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels()).logits


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head", HEADS)
def test_small_steps_are_taken(tmp_path, dtype, head):
    """Adam moves every entry by about lr. A head in bfloat16 moves a sixth of them at all."""
    ends, arguments = {}, {"learning_rate": 1e-5, "max_steps": 20, **ADAM}
    for base in (torch.float32, dtype):
        model = head_on(base, HEADS[head]())
        before = linear_classifier(model).weight.detach().clone()
        run = trainer(tmp_path, model, eval_dataset=tiny_images(40, seed=1), **arguments)
        run.train()
        assert next(model.get_base_model().parameters()).dtype == base
        assert {value.dtype for value in weights(model).values()} == {torch.float32}
        ends[base] = linear_classifier(model).weight.detach() - before.float(), run.evaluate()["eval_accuracy"]
    (moved, accuracy), (expected, wide) = ends[dtype], ends[torch.float32]
    assert (moved != 0).double().mean() > 0.99
    assert torch.cosine_similarity(moved.flatten(), expected.flatten(), 0) > 0.9
    assert abs(accuracy - wide) <= 0.1


@pytest.mark.parametrize(
    "build",
    [
        lambda: get_peft_model(tiny_clip().half(), LoraConfig(**LORA), autocast_adapter_dtype=False),
        lambda: get_peft_model(tiny_clip(), LoraConfig(**LORA)).half(),
        lambda: get_peft_model(tiny_clip(), NPTConfig.ivlp(text_init=[6, 7])).half(),
        lambda: get_peft_model(tiny_clip(), NPTConfig.maple(text_init=[6, 7])).half(),
        lambda: get_peft_model(tiny_clip(), VeraConfig(target_modules=["q_proj"], projection_prng_key=1)).half(),
        lambda: get_peft_model(
            tiny_clip().half(), NPTConfig.ivlp(text_init=[6], modules_to_save=["visual_projection"])
        ),
        lambda: get_peft_model(tiny_clip().half(), LoraConfig(**LORA, modules_to_save=["visual_projection"])),
        lambda: get_peft_model(tiny_vit_classifier(), HEADS["lora"]()).half(),
        lambda: get_peft_model(tiny_vit_classifier(), PrototypeConfig(num_vision_tokens=2, trainable=True)).half(),
        lambda: get_peft_model(tiny_vit_classifier().half(), LoraConfig(**LORA, modules_to_save=["layernorm"])),
    ],
    ids=[
        "uncast",
        "lora",
        "prompts",
        "coupled",
        "vera",
        "projection",
        "lora_projection",
        "head",
        "prototypes",
        "norm",
    ],
)
def test_a_gradient_scaler_takes_every_adapter(tmp_path, build):
    """It refuses float16 gradients. Its optimiser is from before the trainer, and steps all the same."""
    model = build()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, scaler = torch.optim.SGD(trained, 1.0), torch.amp.GradScaler("cpu", init_scale=64.0)
    run = trainer(tmp_path, model)
    before = [parameter.detach().clone() for parameter in trained]
    run.features.begin(dict(run.task.texts(run.class_names)) if run.task.reads_text else {})
    loss = run.compute_loss(run.extractor, next(iter(run.get_train_dataloader())))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    moved = [not torch.equal(parameter, start) for parameter, start in zip(trained, before, strict=True)]
    assert sum(moved) >= len(moved) / 2  # all but the A of LoRA's, behind a B of zeros


@pytest.mark.parametrize("dtype", HALVES)
def test_a_resnet_takes_the_pixels_of_its_precision(tmp_path, dtype):
    config = LoraConfig(target_modules=["convolution"], modules_to_save=["classifier"])
    run = trainer(tmp_path, get_peft_model(tiny_resnet().to(dtype), config), max_steps=2, eval_dataset=tiny_images(8))
    run.train()
    assert {value.dtype for value in weights(run.model).values()} == {torch.float32}
    assert run.evaluate()["eval_loss"] < 10


def test_whoever_casts_between_trainings_changes_nothing(tmp_path):
    model = head_on(torch.float32, HEADS["prompts"]())
    run = trainer(tmp_path, model, max_steps=1)
    model.bfloat16()
    run.train()
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize("residual", [False, True])
def test_few_shot_heads_too(residual):
    images, labels = tiny_images(10)["image"][:], tiny_images(10)["label"][:]
    torch.manual_seed(0)
    model = get_peft_model(tiny_vit_classifier(), CoPAConfig(residual_adapters=residual)).bfloat16()
    classifier = adapt(model, images, labels, steps=5, processor=tiny_processor())
    learned = [parameter for name, parameter in model.named_parameters() if "ncgeo_copa" in name]
    assert {parameter.dtype for parameter in learned} == {torch.float32}
    assert all(len(parameter.unique()) > parameter.numel() / 2 for parameter in learned if parameter.dim() == 2)
    assert classifier.predict_proba(images).isfinite().all()


@pytest.fixture(scope="module", params=HEADS)
def trained(request, tmp_path_factory):
    """A head on a base in bfloat16, far from its start, and its folder."""
    run = trainer(tmp_path_factory.mktemp("run"), head_on(torch.bfloat16, HEADS[request.param]()), max_steps=3)
    run.train()
    run.save_model()
    return run.model, run.args.output_dir, request.param


def test_a_file_gives_back_every_bit(trained):
    model, folder, head = trained
    expected = logits_of(model)
    assert expected.dtype == torch.float32  # logits are not rounded either
    loaders = [load_adapter] if head == "lora" else [load_adapter, lambda f, base: PeftModel.from_pretrained(base, f)]
    for load in loaders:
        loaded = load(folder, tiny_vit_classifier().bfloat16())
        assert torch.equal(linear_classifier(loaded).weight, linear_classifier(model).weight)
        assert torch.equal(logits_of(loaded), expected)


def test_copies_keep_working(trained):
    model, _, head = trained
    expected = logits_of(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(copied), expected)
    with torch.no_grad(), model.disable_adapter():
        base = model(pixel_values=pixels()).logits
    assert torch.equal(base, logits_of(tiny_vit_classifier().bfloat16()))
    if head == "lora":  # merging rounds, the head does not
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(logits_of(merged), expected, atol=0.02, rtol=0.02)
        assert torch.equal(merged.classifier.weight, linear_classifier(model).weight)
        assert logits_of(merged.float()).dtype == torch.float32
    else:
        assert logits_of(copy.deepcopy(model).unload()).isfinite().all()


def test_an_interrupted_training_ends_alike(tmp_path):
    ends = []
    for stop in (False, True):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **ADAM}
        run = trainer(tmp_path / str(stop), head_on(torch.bfloat16, HEADS["lora"]()), **options)
        run.train()
        if stop:
            run = trainer(tmp_path / str(stop), head_on(torch.bfloat16, HEADS["lora"]()), **options)
            run.train(resume_from_checkpoint=str(tmp_path / str(stop) / "checkpoint-2"))
        ends.append(weights(run.model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_projection_gives_what_the_base_did(tmp_path):
    """Inside a model others go on with its output; an export has one precision."""
    config = NPTConfig.ivlp(
        text_init=[6, 7, 8, 6], modules_to_save=["visual_projection"], text_depth=2, vision_depth=2
    )
    model = get_peft_model(tiny_clip().bfloat16(), config)
    run = trainer(tmp_path, model, max_steps=1)
    run.train()
    with torch.no_grad():
        out = model.eval()(pixel_values=pixels(), **texts())
    assert out.image_embeds.dtype == out.text_embeds.dtype == torch.bfloat16
    expected = ZeroShotClassifier(model, tiny_processor()).predict_proba(tiny_images(4)["image"][:], NAMES)
    folder = export_classifier(model, NAMES, tmp_path / "export", tiny_processor())
    exported = ExportedClassifier.from_pretrained(folder).eval()
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    images = tiny_processor().image_processor(images=tiny_images(4)["image"][:], return_tensors="pt")
    with torch.no_grad():
        found = exported(images["pixel_values"]).logits.softmax(-1)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


def test_slerp_is_not_rounded_away(tmp_path):
    """Each step's rotation is far below a half's resolution."""
    model = head_on(torch.bfloat16, HEADS["prompts"]())
    run = trainer(tmp_path, model, callbacks=[SlerpAlignment(alpha=0.5)], learning_rate=0.0, max_steps=6)
    before = linear_classifier(model).weight.detach().clone()
    run.train()
    assert (linear_classifier(model).weight != before).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_a_base_is_not_trained_in_half_precision(tmp_path, dtype):
    """Nothing holds its own weights in float32."""
    model = tiny_vit_classifier().to(dtype)
    refused = pytest.raises(ValueError, match=f"trained in {dtype}.*dtype=torch.float32")
    with refused if dtype in HALVES else nullcontext():
        trainer(tmp_path, model)
    biased = head_on(dtype, LoraConfig(**LORA, bias="lora_only"))
    with refused if dtype in HALVES else nullcontext():
        trainer(tmp_path, biased)
