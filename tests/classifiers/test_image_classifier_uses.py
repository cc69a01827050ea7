"""Image classifiers made of a CLIP or a backbone, under everything that takes an image classifier."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from peft_ncgeo import CoPAConfig, ImageClassifier, NPTConfig, PrototypeConfig, adapt
from peft_ncgeo.classifiers.exported_classifier import ExportedClassifier
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.geometry.alignment import rotate_towards_means
from peft_ncgeo.hub import create_card, export_classifier, load_adapter, save_adapter
from peft_ncgeo.hub.push import _check_base
from peft_ncgeo.losses import OTPreservation, PrototypeSupCon, SpaceAlignment
from peft_ncgeo.models import encode_images
from peft_ncgeo.models.heads import linear_classifier
from peft_ncgeo.protocols import long_tail
from peft_ncgeo.training import Recipe, SlerpAlignment, align_classifier

from ..conftest import NAMES, checkpoint, pixels, tiny, tiny_clip, tiny_images, tiny_processor, tiny_vit
from ..training.runs import pixels_and_labels, trainer

HEAD = {"modules_to_save": ["classifier"]}
METHODS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **HEAD),
    "lora, all linear": lambda: LoraConfig(r=2, target_modules="all-linear", exclude_modules=["classifier"], **HEAD),
    "ia3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], **HEAD),
    "adalora": lambda: AdaLoraConfig(target_modules=["q_proj"], total_step=20, **HEAD),
    "prompts": lambda: NPTConfig.vpt(vision_depth=3, **HEAD),
    "prototypes": lambda: PrototypeConfig(projection_dim=16, num_vision_tokens=2, vision_depth=3),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*no images of class", "ignore:The head belongs")


def classifier(head: str = "cosine", **options) -> ImageClassifier:
    torch.manual_seed(2)
    return ImageClassifier.from_backbone(
        tiny_clip(), NAMES, head=head, init="texts", processor=tiny_processor(), **options
    )


def of_vit(head: str = "linear") -> ImageClassifier:
    torch.manual_seed(2)
    return ImageClassifier.from_backbone(tiny_vit(), NAMES, head=head)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels()).logits


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [classifier, of_vit])
def test_trained_saved_and_loaded_onto_a_saved_base(make, name, tmp_path):
    make().save_pretrained(tmp_path / "base")
    base = ImageClassifier.from_pretrained(tmp_path / "base")
    untouched = logits(base)
    model = get_peft_model(base, METHODS[name]())
    # PEFT's configs of heads with names do not say the type of the task, so the base's class is looked up
    run = trainer(tmp_path, model, eval_dataset=tiny_images(10), max_steps=2)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    trained = logits(model)
    assert not torch.allclose(trained, untouched, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), untouched)
    save_adapter(model, tmp_path / "adapter", tiny_processor().image_processor)
    torch.testing.assert_close(logits(load_adapter(tmp_path / "adapter", tmp_path / "base")), trained)
    run.save_model(tmp_path / "trained")
    loaded = load_adapter(tmp_path / "trained")  # the base's folder is in the adapter's config
    torch.testing.assert_close(logits(loaded), trained)
    assert list(loaded.get_base_model().config.id2label.values()) == NAMES


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_geometric_losses_train_it(head, tmp_path):
    model = get_peft_model(classifier(head), METHODS["lora"]())
    losses = [SpaceAlignment(weight=0.1), OTPreservation(weight=0.5, modality="image")]
    run = trainer(tmp_path, model, losses, callbacks=[SlerpAlignment()], max_steps=3, learning_rate=1e-2)
    before = linear_classifier(model).weight.clone()
    run.train()
    logged = {key for entry in run.state.log_history for key in entry}
    assert {"loss/ce", "loss/space_alignment"} <= logged
    assert not torch.equal(linear_classifier(model).weight, before)


def test_prototypes_by_supervised_contrast(tmp_path):
    model = get_peft_model(classifier(), METHODS["prototypes"]())
    run = trainer(tmp_path, model, [PrototypeSupCon()], classify=False, max_steps=2)
    run.train()
    assert linear_classifier(model).weight.shape == (5, 16)


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("tuned", [False, True])
def test_the_head_is_aligned(head, tuned):
    model, images = classifier(head), tiny_images(40)
    model = get_peft_model(model, METHODS["lora"]()) if tuned else model
    x, labels = pixels_and_labels(images)
    with torch.no_grad():
        features = encode_images(model, x)
    means = torch.stack([features[torch.tensor(labels) == k].mean(0) for k in range(5)])
    start = linear_classifier(model).weight.detach().clone()
    aligned = align_classifier(model, images, 0.6, tiny_processor())
    now = linear_classifier(model).weight
    torch.testing.assert_close(now, rotate_towards_means(start, means.double(), 0.6).float(), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        found = model.eval()(pixel_values=x).logits.argmax(1)
    assert aligned.accuracy_after == pytest.approx((found == torch.tensor(labels)).double().mean().item())
    assert aligned.predict(images["image"][:40]) == [NAMES[i] for i in found]
    aligned.undo()
    assert torch.equal(linear_classifier(model).weight, start)


def test_a_cosine_head_is_judged_by_angles():
    """Rows of very different lengths: their products with features would choose another class."""
    model, images = classifier(), tiny_images(40)
    with torch.no_grad():
        model.classifier.weight.mul_(torch.tensor([1.0, 30.0, 0.1, 5.0, 2.0])[:, None])
    x, labels = pixels_and_labels(images)
    with torch.no_grad():
        found = model(pixel_values=x).logits.argmax(1)
        assert not torch.equal((encode_images(model, x) @ model.classifier.weight.T).argmax(1), found)
    aligned = align_classifier(model, images, 0.0, tiny_processor())
    assert aligned.predict(images["image"][:]) == [NAMES[i] for i in found]
    assert aligned.accuracy_before == pytest.approx((found == torch.tensor(labels)).double().mean().item())


def tiny_resnet() -> ResNetModel:
    return tiny(ResNetModel, ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))


@pytest.mark.parametrize("backbone", [tiny_clip, tiny_vit, tiny_resnet])
@pytest.mark.parametrize("residual", [False, True])
def test_few_shot_adaptation(backbone, residual):
    base = ImageClassifier.from_backbone(backbone(), NAMES)
    images = tiny_images(10)
    with torch.no_grad():
        expected = encode_images(base, pixels())
    torch.testing.assert_close(ImageFeatures(base)(pixels()), expected)
    model = get_peft_model(base, CoPAConfig(residual_adapters=residual))
    if not residual:  # heads start as the identity, residual adapters near it
        with torch.no_grad():
            torch.testing.assert_close(encode_images(model, pixels()), expected)
    made = adapt(model, images["image"][:], images["label"][:], steps=2, processor=tiny_processor())
    assert set(made.predict(images["image"][:])) <= set(range(5))
    with torch.no_grad():
        assert not torch.equal(encode_images(model, pixels()), expected)
        with model.disable_adapter():
            torch.testing.assert_close(encode_images(model, pixels()), expected)


def test_card(tmp_path):
    model = get_peft_model(classifier(), METHODS["lora"]())
    run = trainer(tmp_path, model, eval_dataset=tiny_images(10), max_steps=1)
    run.train()
    save_adapter(run.model, tmp_path / "adapter", tiny_processor().image_processor)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert str(tmp_path) not in card
    assert create_card(run.model)


def test_a_push_knows_that_the_base_holds_the_head(tmp_path):
    """An adapter without a head of its own fits a saved ImageClassifier, and no backbone."""
    classifier().save_pretrained(tmp_path / "base")
    model = get_peft_model(classifier(), LoraConfig(target_modules=["q_proj"]))
    _check_base(model, str(tmp_path / "base"), None)
    tiny_clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="is a clip"):
        _check_base(model, str(tmp_path / "clip"), None)


def test_protocol(tmp_path):
    recipe = Recipe("lora", METHODS["lora"], args={"max_steps": 1})
    images = tiny_images(50)
    results = long_tail(
        [recipe],
        images,
        images,
        classifier,
        tiny_processor(),
        tmp_path,
        imbalance_factors=[5],
        seeds=[1],
        thresholds="thirds",
    )
    assert 0 <= results.rows[0]["all"] <= 100


def test_export_says_what_to_do(tmp_path):
    """A cosine head on CLIP's projected tower is exported; of others, saving does as well."""
    for other in (classifier("linear"), of_vit("cosine")):
        with pytest.raises(ValueError, match="save_pretrained"):
            export_classifier(other, NAMES, tmp_path / "export", tiny_processor())
    export_classifier(classifier(), NAMES, tmp_path / "export", tiny_processor())
    exported = ExportedClassifier.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        torch.testing.assert_close(exported(pixels()).logits, logits(classifier()))


def test_merged_lora_is_a_plain_classifier_again(tmp_path):
    model = get_peft_model(classifier(), METHODS["lora"]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits(model)
    copy.deepcopy(model).merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(ImageClassifier.from_pretrained(tmp_path)), expected, atol=1e-5, rtol=1e-4)


def test_a_full_training_leaves_no_weight_without_gradient():
    """Several processes would wait for it for ever."""
    for made in (classifier(), of_vit()):
        made.train()
        F.cross_entropy(made(pixel_values=pixels()).logits, torch.tensor([0, 1, 2])).backward()
        assert [name for name, p in made.named_parameters() if p.grad is None] == []


def test_gradient_checkpointing_changes_nothing():
    made = classifier().train()
    made(pixel_values=pixels(), labels=torch.tensor([0, 1, 2])).loss.backward()
    expected = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    checkpoint(made)
    made(pixel_values=pixels(), labels=torch.tensor([0, 1, 2])).loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in made.named_parameters()}, expected)
