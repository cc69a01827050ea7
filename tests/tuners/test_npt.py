"""NPTConfig: published sizes, starts, presets, and what bad input gets."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from peft_ncgeo import NPTConfig
from peft_ncgeo.data import class_prompts, load_demo
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.text_encoder import text_features
from peft_ncgeo.models.towers import find_towers

from ..conftest import pixels, texts, tiny_clip, tiny_vit, tiny_vit_classifier


@pytest.fixture(scope="module")
def vit_b16() -> CLIPModel:
    config = CLIPConfig(
        text_config=CLIPTextConfig().to_dict(), vision_config=CLIPVisionConfig(patch_size=16).to_dict()
    )
    with torch.device("meta"):  # shapes only
        return CLIPModel(config)


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("coop", 8_192), ("ivlp", 46_080), ("prompt_ot", 61_440), ("maple", 3_555_072), ("vpt", 12 * 8 * 768)],
)
def test_published_sizes(vit_b16, preset, parameters):
    model = get_peft_model(copy.deepcopy(vit_b16), getattr(NPTConfig, preset)())
    assert model.get_nb_trainable_parameters()[0] == parameters


def test_presets_take_overrides():
    assert NPTConfig.coop(num_text_tokens=4).num_text_tokens == 4
    assert NPTConfig.ivlp(text_depth=2).vision_depth == 9


@torch.no_grad()
def test_prompts_that_spell_the_template_change_nothing():
    """Context = the embeddings of "a photo of a": plain CLIP's features, the one exact anchor to the base model."""
    demo = load_demo(shots=1)
    names = demo.splits["new"].features["label"].names
    plain = class_prompts(names, "a photo of a {}.", 0, demo.processor.tokenizer)
    expected = text_features(demo.model, **plain)
    model = get_peft_model(demo.model, NPTConfig(num_text_tokens=4, text_init="a photo of a")).eval()
    assert model.peft_config["default"].placeholder_ids == plain["input_ids"][0, 1:5].tolist()
    prompts = class_prompts(names, "a photo of a {}.", 4, demo.processor.tokenizer)
    torch.testing.assert_close(text_features(model, **prompts), expected, atol=1e-5, rtol=1e-5)
    # whatever the placeholders are, they are gone
    junk = {**prompts, "input_ids": prompts["input_ids"].clone()}
    junk["input_ids"][:, 1:5] = 50
    with pytest.warns(UserWarning, match=r"Slots 1..4.*not.*adapter's"):
        features = text_features(model, **junk)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        text_features(model, **{**junk, "input_ids": junk["input_ids"].clone()})


@torch.no_grad()
def test_deep_layers_equal_a_recomputation():
    """Text and vision towers run by hand, layer by layer, with the prompts written where the papers say."""
    torch.manual_seed(0)
    config = NPTConfig.ivlp(text_init=[6, 7], text_depth=2, vision_depth=3)
    model = get_peft_model(tiny_clip(attn_implementation="eager"), config).double().eval()
    prompts = dict(model.named_parameters())
    base = tiny_clip(attn_implementation="eager").double()

    def prompt(path):
        return prompts[f"base_model.model.{path}.ncgeo_npt_prompt.default"]

    inputs = texts(4)
    text = base.text_model
    ids = inputs["input_ids"]
    h = text.embeddings.token_embedding(ids)
    h[:, 1:5] = prompt("text_model.embeddings")
    h = h + text.embeddings.position_embedding.weight[: ids.shape[1]]
    causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), dtype=h.dtype).triu(1)[None, None]
    for i, layer in enumerate(text.encoder.layers):
        if i == 1:
            h[:, 1:5] = prompt("text_model.encoder.layers.1")
        h = layer(h, attention_mask=causal)
    pooled = text.final_layer_norm(h)[torch.arange(len(ids)), (ids == 3).int().argmax(1)]
    torch.testing.assert_close(text_features(model, **inputs), base.text_projection(pooled))

    vision = base.vision_model
    images = pixels().double()
    h = vision.embeddings(images)
    h = vision.pre_layrnorm(torch.cat([h, prompt("vision_model.embeddings").expand(len(h), -1, -1)], 1))
    for i, layer in enumerate(vision.encoder.layers):
        if i in (1, 2):
            h[:, -4:] = prompt(f"vision_model.encoder.layers.{i}")
        h = layer(h, attention_mask=None)
    pooled = vision.post_layernorm(h[:, 0])
    torch.testing.assert_close(encode_images(model, images), base.visual_projection(pooled))


# ---- how prompts start --------------------------------------------------------------------------------------------


def first_prompt(model) -> torch.Tensor:
    return dict(model.named_parameters())["base_model.model.text_model.embeddings.ncgeo_npt_prompt.default"]


def test_start_from_token_ids():
    embedding = tiny_clip().text_model.embeddings.token_embedding.weight
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=3, text_init=[6, 7, 8, 9, 10]))
    assert torch.equal(first_prompt(model), embedding[[6, 7, 8]])  # too long: the first n
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=3, text_init=[6]))
    assert torch.equal(first_prompt(model)[0], embedding[6])  # too short: the rest is random
    assert 0 < first_prompt(model)[1:].abs().max() < 0.15
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=3, text_init=[6, 7, 8], init_weights=False))
    assert not torch.equal(first_prompt(model), embedding[[6, 7, 8]])


def test_start_from_a_phrase_needs_the_tokenizer_once(tmp_path, processor):
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = NPTConfig(num_text_tokens=4, text_init="a photo of a", tokenizer_name_or_path=str(tmp_path / "tokenizer"))
    model = get_peft_model(tiny_clip(), config)
    embedding = tiny_clip().text_model.embeddings.token_embedding.weight
    assert torch.equal(first_prompt(model), embedding[[6, 7, 8, 6]])
    assert config.placeholder_ids == [6, 7, 8, 6]
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # loading asks for no tokenizer, trainable or not
        for trainable in (False, True):
            loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path / "adapter", is_trainable=trainable)
            assert torch.equal(first_prompt(loaded), first_prompt(model))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["template"] == "a photo of a {}."


def test_no_tokenizer_is_one_warning_that_names_the_field():
    with pytest.warns(UserWarning, match="No tokenizer.*text_init='a.*a'") as caught:
        get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=4, text_init="a photo of a"))
    named = [w for w in caught if "tokenizer_name_or_path" in str(w.message)]
    assert len(named) == 1


def test_a_model_saved_without_its_tokenizer_has_none(tmp_path):
    """Transformers gives one for it that turns every word into its unknown token."""
    tiny_clip().save_pretrained(tmp_path)
    config = NPTConfig(num_text_tokens=4, text_init="a photo of a")
    with pytest.warns(UserWarning, match="No tokenizer.*text_init='a.*a'"):
        get_peft_model(CLIPModel.from_pretrained(tmp_path), config)
    assert config.phrase_ids == config.placeholder_ids == []


def test_a_depth_beyond_the_tower_is_one_warning():
    with pytest.warns(
        UserWarning, match=r"CLIPModel has fewer layers .*\(text_depth=12 > 3, vision_depth=12 > 4\)"
    ) as caught:
        get_peft_model(tiny_clip(), NPTConfig.prompt_ot(text_init=[6]))
    assert len([w for w in caught if "get prompts" in str(w.message)]) == 1


def test_token_ids_belong_to_their_model_and_fields(tmp_path, processor):
    """One config, used twice: the second model gets its own ids, and a changed phrase new ones."""
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = NPTConfig(num_text_tokens=4, text_init="a photo of a")
    with pytest.warns(UserWarning, match="No tokenizer found"):
        get_peft_model(tiny_clip(), config)
    assert config.phrase_ids == config.placeholder_ids == []
    with pytest.warns(UserWarning, match="No tokenizer found"):
        get_peft_model(tiny_clip(), config)
    config.tokenizer_name_or_path = str(tmp_path / "tokenizer")
    get_peft_model(tiny_clip(), config)
    assert config.phrase_ids == [6, 7, 8, 6]
    other = dataclasses.replace(config, text_init="the red cat", template="in {}.", num_text_tokens=6)
    get_peft_model(tiny_clip(), other)
    assert other.phrase_ids == [9, 11, 16]
    assert other.placeholder_ids == [5] * 5 + [10]


def test_init_std():
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=10, init_std=0.5))
    assert first_prompt(model).detach().std() == pytest.approx(0.5, rel=0.15)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_text_tokens": -1}, "num_text_tokens=-1 must be a whole number of at least 0"),
        ({"num_text_tokens": 4, "text_depth": 0}, "text_depth=0 must be a whole number of at least 1"),
        ({"num_vision_tokens": 2.5}, "num_vision_tokens=2.5 must be a whole number"),
        ({"init_std": -0.1}, "init_std=-0.1"),
        ({"template": "a photo"}, r"must hold '\{\}' once"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NPTConfig(**fields)


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (tiny_clip, NPTConfig(), "Nothing to learn: set num_text_tokens or num_vision_tokens"),
        (tiny_vit, NPTConfig(num_text_tokens=2, text_init=[1]), "ViTModel has no text tower to prompt; set num_text_"),
        (tiny_clip, NPTConfig(num_text_tokens=14), "leaves no room for a name among 16 slots"),
        (tiny_clip, NPTConfig(num_text_tokens=2, text_init=[6, 99]), "token id 99, but the model knows 50"),
        (tiny_clip, NPTConfig(num_vision_tokens=2, exclude_modules=["vision_model"]), "no vision tower to prompt"),
        (tiny_clip, NPTConfig(num_vision_tokens=2, exclude_modules="vision_model"), "no vision tower to prompt"),
        (tiny_clip, NPTConfig(num_vision_tokens=2, exclude_modules=["vison"]), "exclude_modules names 'vison', which"),
    ],
)
def test_configs_that_do_not_fit_the_model(build, config, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(build(), config)


def test_a_name_under_the_prompts_is_refused():
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=6))
    with pytest.raises(ValueError, match=r"A.*5.*prompts.*1..6"):
        text_features(model, **texts(3))
    inputs = texts(6)
    text_features(model, **inputs)
    inputs["input_ids"][0, 4] = 3  # changed in place: looked at again
    with pytest.raises(ValueError, match="A text ends at slot 4"):
        text_features(model, **inputs)


@torch.no_grad()
def test_legacy_pooling_is_checked_where_it_pools():
    """Models saved with eos_token_id 2 pool at the largest id of each row."""
    model = get_peft_model(tiny_clip(eos_token_id=2), NPTConfig(num_text_tokens=3))
    text_features(model, input_ids=torch.tensor([[1, 5, 5, 5, 20, 49, 49], [1, 5, 5, 5, 48, 0, 0]]))
    with pytest.raises(ValueError, match="A text ends at slot 2"):
        text_features(model, input_ids=torch.tensor([[1, 5, 49, 49, 49]]))


@pytest.mark.filterwarnings("ignore:.*all of them get prompts")
def test_adapter_of_another_architecture_is_named(tmp_path):
    model = get_peft_model(tiny_clip(), NPTConfig.ivlp(text_init=[6], text_depth=2, vision_depth=2))
    model.save_pretrained(tmp_path)
    other = tiny_clip()
    other.text_model.encoder.layers = other.text_model.encoder.layers[:1]
    with pytest.raises(ValueError, match=r"another architecture or depth: unexpected .*text_model.encoder.layers.1"):
        PeftModel.from_pretrained(other, tmp_path)
    wide = CLIPModel(CLIPConfig(text_config={"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"is \(4, 32\), the model takes \(4, 64\)"):
        PeftModel.from_pretrained(wide, tmp_path)


def test_registering_twice_changes_nothing():
    from peft import PeftType

    from peft_ncgeo.registration import register

    before = list(PeftType)
    register()
    assert list(PeftType) == before
    assert PeftType("NCGEO_NPT") is PeftType["NCGEO_NPT"] is PeftType.NCGEO_NPT


def test_towers_are_found_under_wrappers():
    plain, wrapped = tiny_clip(), get_peft_model(tiny_clip(), NPTConfig.ivlp(text_init=[6], text_depth=1))
    assert find_towers(plain) == find_towers(wrapped.get_base_model())
    assert find_towers(plain)["text"].reading.end_of_text.token_id == 3
    assert "text" not in find_towers(tiny_vit())


def test_demo_tokenizer_is_found_by_the_models_path():
    demo = load_demo(shots=1)
    assert AutoTokenizer.from_pretrained(demo.model.name_or_path)("a photo of a", add_special_tokens=False).input_ids


def test_a_task_type_that_names_a_head_of_another_model_too(tmp_path):
    """PEFT's `SEQ_CLS` keeps "classifier" and "score", of which a model has one."""
    images = pixels(2)
    model = get_peft_model(tiny_vit_classifier(), NPTConfig.vpt(vision_depth=2, task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit_classifier(), tmp_path)
    assert torch.equal(loaded.base_model(images).logits, model.base_model(images).logits)
    with pytest.raises(ValueError, match="modules_to_save names 'score', which ViTForImageClassification does not"):
        get_peft_model(tiny_vit_classifier(), NPTConfig.vpt(vision_depth=2, modules_to_save=["score"]))
