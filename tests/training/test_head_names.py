"""An image classifier's outputs keep the names of what they were trained on, and meet labels by name alone."""

from __future__ import annotations

import pytest
import torch
from datasets import ClassLabel
from peft import PeftModel
from transformers import AutoModelForImageClassification, pipeline

from peft_ncgeo.data.head_names import head_names, same_names, write_head_names
from peft_ncgeo.hub import load_adapter, save_adapter
from peft_ncgeo.training import align_classifier, sweep_alignment

from ..conftest import NAMES, tiny_images, tiny_processor, tiny_vit_classifier
from .runs import lora_vit, prototypes, trainer, vit

OTHERS = [f"imagenet {i}" for i in range(5)]
ORDER = sorted(NAMES)  # as an image folder has them
pytestmark = pytest.mark.filterwarnings("ignore:No processor", "ignore:The head belongs")


def called(model, names):
    write_head_names(model, names)
    return model


def in_other_order(images):
    """The same images and classes; each label is another number."""
    features = images.features.copy()
    features["label"] = ClassLabel(names=ORDER)
    return images.map(lambda row: {"label": ORDER.index(NAMES[row["label"]])}, features=features)


def spelled(images, names):
    return images.cast_column("label", ClassLabel(names=names))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A head that has learned NAMES on a base that had other names, in its folder."""
    run = trainer(tmp_path_factory.mktemp("run"), called(lora_vit(), OTHERS), num_train_epochs=8)
    run.train()
    run.save_model()
    return run


def names_of(model):
    config = model.get_base_model().config if isinstance(model, PeftModel) else model.config
    assert config.label2id == {name: i for i, name in config.id2label.items()}
    return [config.id2label[i] for i in range(len(config.id2label))]


@pytest.mark.parametrize("base", [tiny_vit_classifier, lambda: called(tiny_vit_classifier(), OTHERS)])
@pytest.mark.parametrize("build", [vit, lora_vit, prototypes])
def test_training_writes_the_names(tmp_path, monkeypatch, base, build):
    monkeypatch.setattr("tests.training.runs.tiny_vit_classifier", base)
    run = trainer(tmp_path, build(), max_steps=1)
    assert names_of(run.model) != NAMES
    run.train()
    assert names_of(run.model) == NAMES


@pytest.mark.slow
def test_a_checkpoint_of_other_classes_or_another_order_is_not_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, lora_vit(), max_steps=1, **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    for images in (in_other_order(tiny_images()), spelled(tiny_images(), [*NAMES[:4], "a sixth"])):
        with pytest.raises(ValueError, match="Cannot resume.*red cat"):
            trainer(tmp_path, lora_vit(), train=images, max_steps=2, **options).train(checkpoint)
    again = trainer(
        tmp_path, lora_vit(), train=spelled(tiny_images(), [n.upper() for n in NAMES]), max_steps=2, **options
    )
    assert again.train(checkpoint).global_step == 2


def test_they_are_wherever_the_model_goes(trained, tmp_path):
    image, processor = tiny_images(1, seed=9)["image"][0], tiny_processor().image_processor
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = NAMES[int(trained.model.eval()(pixel_values=pixels).logits.argmax())]
    folders = {"saved": tmp_path / "saved", "of the trainer": trained.args.output_dir}
    save_adapter(trained.model, folders["saved"], processor)  # without the record, which has names of its own
    places = {name: load_adapter(folder, tiny_vit_classifier()).get_base_model() for name, folder in folders.items()}
    load_adapter(folders["saved"], tiny_vit_classifier()).merge_and_unload().save_pretrained(tmp_path / "merged")
    places["merged"] = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    places["at hand"] = trained.model.get_base_model()
    for name, model in places.items():
        assert names_of(model) == NAMES, name
        assert pipeline("image-classification", model=model, image_processor=processor)(image)[0]["label"] == expected


@pytest.mark.parametrize("name", ["default", "digits"])
def test_the_file_lies_beside_the_adapter(tmp_path, name):
    model = vit()
    if name != "default":
        model.add_adapter(name, model.peft_config["default"])
        model.set_adapter(name)
    run = trainer(tmp_path, model, max_steps=1)
    run.train()
    run.save_model()
    folder = tmp_path / (name if name != "default" else "")
    assert names_of(load_adapter(folder, tiny_vit_classifier())) == NAMES


def test_another_order_is_refused_everywhere(trained, tmp_path):
    """By everything that would compare labels with outputs by their places; the mend gives back what is right."""
    images, processor = tiny_images(40, seed=1), tiny_processor()
    moved, model = in_other_order(images), trained.model
    accuracy = trained.evaluate(images)["eval_accuracy"]
    assert accuracy > 0.3  # else a wrong order could be as good

    refused = {
        "training": lambda: trainer(tmp_path, model, train=moved),
        "evaluation set": lambda: trainer(tmp_path, model, eval_dataset=moved),
        "evaluate": lambda: trained.evaluate(moved),
        "predict": lambda: trained.predict(moved),
        "alignment": lambda: align_classifier(model, moved, 0.5, processor),
        "validation": lambda: align_classifier(model, images, 0.5, processor, validation=moved),
        "sweep": lambda: sweep_alignment(model, moved, moved, processing_class=processor),
    }
    for name, call in refused.items():
        with pytest.raises(ValueError, match="in another order.*align_labels_with_mapping") as error:
            call()
        assert "\n" not in str(error.value), name
    mapped = moved.align_labels_with_mapping(model.config.label2id, "label")
    assert mapped["label"][:] == images["label"][:]
    assert trainer(tmp_path, model, eval_dataset=mapped).evaluate()["eval_accuracy"] == accuracy
    mend = str(error.value).partition("dataset.")[2].rstrip(".")
    assert eval(f"moved.{mend}", {"moved": moved, "model": model})["label"][:] == images["label"][:]


def test_the_mend_for_evaluation_sets_works(tmp_path):
    """Before training, whose names no config holds yet."""
    images = tiny_images(16)
    moved = in_other_order(images)
    with pytest.raises(ValueError, match="in another order") as error:
        trainer(tmp_path, vit(), eval_dataset=moved)
    mend = str(error.value).partition("dataset.")[2].rstrip(".")
    assert eval(f"moved.{mend}", {"moved": moved, "train_dataset": images})["label"][:] == images["label"][:]


def test_other_names_are_for_training_alone(tmp_path):
    """Nobody knows what outputs of other names have to do with these labels, until they have learned them."""
    model, images = called(vit(), OTHERS), tiny_images(16)
    with pytest.raises(ValueError, match=r"imagenet 0.*id2label = dict"):
        align_classifier(model, images, 0.5, tiny_processor())
    run = trainer(tmp_path, model, eval_dataset=images, max_steps=1)
    before = run.evaluate()  # of a head that is about to learn them
    assert 0 <= before["eval_accuracy"] <= 1
    run.train_dataset, run.class_names = None, []
    with pytest.raises(ValueError, match=r"imagenet 0.*id2label = dict"):
        run.evaluate()
    model.config.id2label = dict(enumerate(images.features["label"].names))  # the mend
    assert run.evaluate()["eval_accuracy"] == before["eval_accuracy"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (["cat", "T_shirt"], ["Cat ", "t-shirt"], False),
        (["cat", "T_shirt"], [" Cat", "t shirt"], True),
        (["cat", "dog"], ["dog", "cat"], False),
        (["Cat", "cat"], ["Cat", "cat"], True),
        (["Cat", "cat"], ["cat", "Cat"], False),  # two classes, told apart by nothing else
        (["straße"], ["STRASSE"], True),
    ],
)
def test_what_is_the_same_name(one, other, same):
    assert same_names(one, other) is same_names(other, one) is same


def test_another_spelling_is_no_other_class(tmp_path):
    images = tiny_images(16)
    shouted = [name.upper().replace(" ", "_") for name in NAMES]
    model = called(vit(), shouted)
    align_classifier(model, images, 0.1, tiny_processor()).undo()
    with pytest.raises(ValueError, match="spell the names as in"):  # `datasets` maps case, but no "_"
        align_classifier(model, in_other_order(images), 0.1, tiny_processor())
    run = trainer(tmp_path, model, max_steps=1, eval_dataset=spelled(images, shouted))
    run.train()
    assert names_of(model) == NAMES  # the data set's
    run.evaluate()
    record = run.record()
    assert record.sets["test"]["trained"]


def test_numbers_are_no_names():
    """Names that Transformers fills in do not count, nor do the names of a config of another size."""
    assert head_names(tiny_vit_classifier()) == []
    assert head_names(called(tiny_vit_classifier(), ["a", "b"])) == []
    assert head_names(called(tiny_vit_classifier(), NAMES)) == NAMES
