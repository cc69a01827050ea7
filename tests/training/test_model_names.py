"""Models that the trainer loads by name, and adapters that it puts on them, against the same made by hand."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    ViTForImageClassification,
    set_seed,
)

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.losses import MultiLabelLoss

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier
from .runs import several_labels, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of a CLIP, of a classifier of the five classes, and of a backbone; with processors."""
    place, images = tmp_path_factory.mktemp("models"), tiny_processor().image_processor
    tiny_clip().save_pretrained(place / "clip")
    tiny_processor().save_pretrained(place / "clip")
    classifier = tiny_vit_classifier()
    classifier.config.id2label = dict(enumerate(NAMES))
    for name, model in {"vit": classifier, "backbone": tiny_vit(), "headless": tiny_vit_classifier()}.items():
        model.save_pretrained(place / name)
        images.save_pretrained(place / name)
    return place


def lora(**fields):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **fields)


def make(output_dir, model=None, peft_config=None, train=None, model_init=None, **arguments):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return GeometryTrainer(
        model=None if model is None else model if isinstance(model, torch.nn.Module) else str(model),
        args=GeometryTrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments}),
        train_dataset=tiny_images() if train is None else train,
        peft_config=peft_config,
        model_init=model_init,
    )


@pytest.mark.slow
def test_a_named_dual_encoder_is_the_model_loaded_by_hand(folder, tmp_path):
    config = lora()
    named = make(tmp_path, folder / "clip", config, model_init_kwargs='{"dtype": "float32"}')
    assert isinstance(named.model.get_base_model(), CLIPModel)
    set_seed(3)
    by_hand = get_peft_model(CLIPModel.from_pretrained(folder / "clip"), lora())
    made = make(tmp_path, model_init=lambda: CLIPModel.from_pretrained(folder / "clip"), peft_config=config)
    hand = make(tmp_path, by_hand)
    for run in (named, made, hand):
        run.train()
    for run in (named, made):
        torch.testing.assert_close(weights(run.model), weights(hand.model), atol=0, rtol=0)
        assert run.model.peft_config["default"] is not config  # PEFT writes into its own
    assert config.base_model_name_or_path is None
    json.dumps(named.args.to_dict())


def test_a_new_head_is_trained_and_saved_with_a_warning(folder, tmp_path):
    with pytest.warns(UserWarning, match="'classifier' is new.*modules_to_save"):
        run = make(tmp_path, folder / "backbone", lora())
    base = run.model.get_base_model()
    assert isinstance(base, ViTForImageClassification)
    assert [base.config.id2label[k] for k in range(5)] == NAMES
    start = weights(run.model)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    heads = [name for name in start if "classifier" in name]
    assert len(heads) == 2
    assert all(not torch.equal(start[name], value) for name, value in weights(run.model).items() if name in heads)
    loaded = PeftModel.from_pretrained(tiny_vit_classifier(), tmp_path / "saved")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], weights(run.model)[name]) for name in heads)
    with pytest.warns(UserWarning, match="outputs of other names"):
        make(tmp_path, folder / "headless", lora())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kept = make(tmp_path, folder / "vit", lora())  # its outputs are the classes
        make(tmp_path, folder / "backbone", lora(modules_to_save=["classifier"]))
    assert not [name for name in weights(kept.model) if "classifier" in name]
    with pytest.raises(ValueError, match="another order"):
        make(tmp_path, folder / "vit", lora(), tiny_images(10, NAMES[::-1]))


@pytest.mark.parametrize("kind", ["lists", "rows", "stream"])
def test_the_head_of_a_named_model_has_the_classes_of_any_kind_of_set(folder, tmp_path, kind):
    images = tiny_images()
    train = images.to_iterable_dataset() if kind == "stream" else several_labels(images, as_rows=kind == "rows")
    loss = {} if kind == "stream" else {"classification_loss": MultiLabelLoss()}
    run = GeometryTrainer(
        str(folder / "backbone"),
        GeometryTrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", disable_tqdm=True),
        train,
        peft_config=lora(modules_to_save=["classifier"]),
        class_names=NAMES if kind == "rows" else None,
        **loss,
    )
    run.train()
    config = run.model.get_base_model().config
    assert [config.id2label[k] for k in range(5)] == NAMES
    assert (config.problem_type == "multi_label_classification") == (kind != "stream")


def test_code_of_a_repository_does_not_make_a_tower_a_classifier(tmp_path, monkeypatch):
    """Transformers keeps the class that a pipeline with `trust_remote_code` loaded before."""
    brought = type("Brought", (CLIPModel,), {"__module__": "transformers_modules.export", "config_class": None})
    mapping = AutoModelForImageClassification._model_mapping
    monkeypatch.setitem(mapping._extra_content, CLIPVisionConfig, brought)
    tiny_clip().vision_model.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="load the model yourself"):
        make(tmp_path, model=tmp_path / "tower")


@pytest.mark.slow
def test_what_is_not_known_is_refused(folder, tmp_path):
    tiny_clip().vision_model.save_pretrained(tmp_path / "tower")
    get_peft_model(tiny_clip(), lora()).save_pretrained(tmp_path / "adapter")
    nameless = json.loads((folder / "clip" / "config.json").read_text()) | {"architectures": None}
    (tmp_path / "nameless").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "nameless" / "config.json").write_text(json.dumps(nameless))
    clip, options = folder / "clip", {"model_init_kwargs": {"dtype": "float32"}}
    for error, words, arguments in (
        (ValueError, "CLIPVisionModel.*load the model yourself", {"model": tmp_path / "tower"}),
        (ValueError, "without architectures", {"model": tmp_path / "nameless"}),
        (OSError, "empty", {"model": tmp_path / "empty"}),
        (ValueError, "holds an adapter", {"model": tmp_path / "adapter"}),
        (ValueError, "neither a folder", {"model": tmp_path / "nowhere"}),
        (ValueError, "dtyp'", {"model": clip, "model_init_kwargs": {"dtyp": "float32"}}),
        (ValueError, "trust_remote_code", {"model": clip, "model_init_kwargs": {"trust_remote_code": True}}),
        (ValueError, "no revisions", {"model": clip, "model_init_kwargs": {"revision": "main"}}),
        (ValueError, "must be a dict", {"model": clip, "model_init_kwargs": [1]}),
        (ValueError, "given by its name", {"model": tiny_clip(), **options}),
        (ValueError, "has an adapter", {"model": get_peft_model(tiny_clip(), lora()), "peft_config": lora()}),
        (TypeError, "peft_config", {"model": clip, "peft_config": {"r": 2}}),
        (ValueError, "needs processing_class", {"model": tiny_clip()}),
    ):
        with pytest.raises(error, match=words) as found:
            make(tmp_path, **arguments)
        assert "\n" not in str(found.value)
