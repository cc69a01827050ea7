"""The table of Transformers' families agrees with what their models do; families that it lacks are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, PreTrainedModel

from peft_ncgeo import CoPAConfig, GeometryTrainer, GeometryTrainingArguments, NPTConfig, PrototypeConfig, adapt
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.evaluation import ZeroShotClassifier
from peft_ncgeo.models.families import FAMILIES
from peft_ncgeo.models.heads import linear_classifier, linear_parameter
from peft_ncgeo.models.text_encoder import encode_texts
from peft_ncgeo.models.towers import find_pooling, find_towers
from peft_ncgeo.training import align_classifier

from ..conftest import IMAGE_SIZE, pixels, tiny, tiny_clip, tiny_images, tiny_processor

LEFT, RIGHT = 1, 3  # of a text
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {**SIZES, "image_size": IMAGE_SIZE, "patch_size": 8}
DINO = {name: value for name, value in IMAGE.items() if name != "intermediate_size"} | {"mlp_ratio": 2}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": LEFT, "pad_token_id": 0}
BERT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
GROUPS = {"depths": [1, 1], "num_group_tokens": [2, 0], "num_output_groups": [2, 2]}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [8, 8, 8],
    "num_attention_heads": [1, 1, 1],
    "depths": [1, 1, 1],
    "key_dim": [4, 4, 4],
}


def build(name: str, **config) -> PreTrainedModel:
    """A random model of this class, the same one for every call, with nothing left at 0."""
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip(f"{name} is newer than this Transformers")
    torch.manual_seed(0)
    model = model_class._from_config(model_class.config_class(**config)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "logit_scale" not in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def dual(name: str, eos: int, image: dict | None = None, **config) -> Callable[[], PreTrainedModel]:
    text = {**TEXT, "eos_token_id": eos}
    return lambda: build(name, text_config=text, vision_config={**IMAGE, **(image or {})}, projection_dim=24, **config)


# ---- texts --------------------------------------------------------------------------------------------------------

MIT = {"mit_hidden_size": 24, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}

# class -> how to build it, and the id of its [EOT] in texts: words have larger ids wherever the first one counts
TEXT_TOWERS = {
    "CLIP": (dual("CLIPModel", RIGHT), RIGHT),
    "CLIP, old config": (dual("CLIPModel", 2), 49),
    "MetaCLIP 2": (dual("MetaClip2Model", 2), 2),
    "CLIPSeg": (dual("CLIPSegModel", RIGHT), RIGHT),
    "CLIPSeg, old config": (dual("CLIPSegModel", 2), 49),
    "GroupViT": (dual("GroupViTModel", RIGHT, GROUPS, projection_intermediate_dim=32), RIGHT),
    "GroupViT, old config": (dual("GroupViTModel", 2, GROUPS, projection_intermediate_dim=32), 49),
    "OwlViT": (dual("OwlViTModel", RIGHT), 49),
    "OWLv2": (dual("Owlv2Model", RIGHT), 49),
    "X-CLIP": (dual("XCLIPModel", RIGHT, {**MIT, "num_frames": 2}, prompt_layers=1), 49),
}


def class_texts(eot: int) -> dict[str, Tensor]:
    """`[BOS] 5 6 name [EOT] pad`, ten names of one to four words."""
    rows = torch.zeros(10, 10, dtype=torch.int64)
    for k in range(10):
        row = [LEFT, 5, 6, *(10 + (7 * k + 11 * i) % 38 for i in range(1 + k % 4)), eot]
        rows[k, : len(row)] = torch.tensor(row)
    return {"input_ids": rows, "attention_mask": (rows != 0).long()}


@pytest.mark.parametrize("name", TEXT_TOWERS)
@torch.no_grad()
def test_texts_are_pooled_where_the_model_pools_them(name):
    make, eot = TEXT_TOWERS[name]
    model, ids = make(), class_texts(eot)["input_ids"]
    tower = find_towers(model)["text"]
    places = tower.reading.end_of_text.positions(ids)
    assert places.tolist() == [row.index(eot) for row in ids.tolist()]
    out = model.get_submodule(tower.embeddings.removesuffix(".embeddings"))(input_ids=ids)
    assert torch.equal(out.last_hidden_state[torch.arange(len(ids)), places], out.pooler_output)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", TEXT_TOWERS)
@torch.no_grad()
def test_prompts_that_equal_the_words_they_replace_change_nothing(name, pack):
    make, eot = TEXT_TOWERS[name]
    texts = class_texts(eot)
    expected = make().get_text_features(**texts).pooler_output
    model = get_peft_model(make(), NPTConfig(num_text_tokens=2, pack_text=pack)).eval()
    base, path = model.get_base_model(), find_towers(make())["text"]
    (prompt,) = (p for key, p in model.named_parameters() if "ncgeo" in key)
    prompt.copy_(base.get_submodule(path.embeddings).token_embedding.weight[[5, 6]])
    seen = []
    base.get_submodule(path.layers[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    torch.testing.assert_close(encode_texts(model, **texts), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base.get_text_features(**texts).pooler_output, expected, atol=1e-5, rtol=1e-5)
    assert (seen[0] != texts["input_ids"].shape) == pack
    prompt.add_(torch.randn_like(prompt))
    assert not torch.allclose(encode_texts(model, **texts), expected, atol=1e-2)


class OwnText(CLIPTextModel):
    """CLIP's text tower, pooled in a way of its own."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.pooler_output = out.last_hidden_state.mean(1)
        return out


def own_text() -> CLIPModel:
    model = dual("CLIPModel", RIGHT)()
    model.text_model = OwnText(model.config.text_config)
    return model


def siglip2() -> PreTrainedModel:
    sizes = {**SIZES, "patch_size": 8, "num_patches": 4}
    return build("Siglip2Model", text_config={**TEXT, "projection_size": 32}, vision_config=sizes)


def flava() -> PreTrainedModel:
    multimodal = {**SIZES, "num_hidden_layers": 1}
    return build("FlavaModel", image_config=IMAGE, text_config=BERT, multimodal_config=multimodal, hidden_size=32)


NO_TEXTS = {
    "own": (own_text, "not known"),
    "AIMv2": (dual("Aimv2Model", RIGHT), "causally only where"),
    "FLAVA": (flava, "every token"),
}


def refusal(call: Callable[[], object], words: str, error: type[Exception] = NotImplementedError) -> str:
    with pytest.raises(error, match=words) as info:
        call()
    assert info.type is error
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("name", NO_TEXTS)
def test_texts_of_other_towers_are_refused_everywhere(name, tmp_path):
    make, words = NO_TEXTS[name]
    known = [family.name for family in FAMILIES.values() if family.text]
    text = refusal(lambda: get_peft_model(make(), NPTConfig(num_text_tokens=2)), words)
    assert type(make()).__name__ in text
    assert all(family in text for family in known)
    processor, images = tiny_processor(), tiny_images(10)
    model = get_peft_model(make(), LoraConfig(target_modules="all-linear", r=2))
    arguments = GeometryTrainingArguments(output_dir=str(tmp_path), report_to="none")
    refusal(lambda: ZeroShotClassifier(model, processor), words)
    refusal(lambda: align_classifier(model, images, 0.5, processor), words)
    refusal(lambda: GeometryTrainer(model, arguments, images, processing_class=processor), words)


# ---- images -------------------------------------------------------------------------------------------------------


def depth_anything() -> PreTrainedModel:
    backbone = transformers.Dinov2Config(**DINO, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    sizes = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [2, 1], "fusion_hidden_size": 8, "head_hidden_size": 8}
    return build("DepthAnythingForDepthEstimation", backbone_config=backbone, reassemble_hidden_size=32, **sizes)


def llava() -> PreTrainedModel:
    words = transformers.LlamaConfig(**SIZES, vocab_size=50)
    return build("LlavaModel", vision_config=transformers.CLIPVisionConfig(**IMAGE), text_config=words)


def segmentation() -> PreTrainedModel:
    sizes = {"extract_layers": [0, 1], "reduce_dim": 24, "decoder_num_attention_heads": 2}
    return dual("CLIPSegForImageSegmentation", RIGHT, **sizes, decoder_intermediate_size=32)()


NO_IMAGE_PROMPTS = {
    "Dinov2Backbone": (lambda: build("Dinov2Backbone", **DINO, out_features=["stage1"]), "feature maps"),
    "DepthAnything": (depth_anything, "feature maps"),
    "CLIPSegForImageSegmentation": (segmentation, "feature maps"),
    "LLaVA": (llava, "not known"),
    "Swin": (lambda: build("SwinForImageClassification", **STAGES), "windows"),
    "Swin V2": (lambda: build("Swinv2ForImageClassification", **STAGES), "windows"),
    "BEiT": (lambda: build("BeitModel", **IMAGE, use_relative_position_bias=True), "position biases of a fixed size"),
    "BEiT, shared": (lambda: build("BeitModel", **IMAGE, use_shared_relative_position_bias=True), "position biases"),
    "Data2Vec": (lambda: build("Data2VecVisionModel", **IMAGE, use_relative_position_bias=True), "position biases"),
    "ViTMAE": (lambda: build("ViTMAEModel", **IMAGE), "at random"),
    "FLAVA": (flava, "tuples"),
    "MLCD": (lambda: build("MLCDVisionModel", **IMAGE), "2-D positions"),
    "YOLOS": (lambda: build("YolosModel", **{**IMAGE, "image_size": [16, 16]}), "detection tokens"),
    "DINOv3Backbone": (lambda: build("DINOv3ViTBackbone", **IMAGE, out_features=["stage1"]), "feature maps"),
    "AIMv2": (lambda: build("Aimv2VisionModel", **IMAGE), "yet"),
    "ResNet": (lambda: build("ResNetModel", hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8), "no image tokens"),
    "ConvNext": (lambda: build("ConvNextModel", hidden_sizes=[8] * 4, depths=[1] * 4), "no image tokens"),
}


@pytest.mark.parametrize("name", NO_IMAGE_PROMPTS)
def test_image_prompts_are_refused_with_the_true_reason(name):
    make, words = NO_IMAGE_PROMPTS[name]
    model, untouched = make(), make()
    text = refusal(lambda: get_peft_model(model, NPTConfig(num_vision_tokens=2)), words)
    assert type(model).__name__ in text
    assert all(family.name in text for family in FAMILIES.values() if family.takes_prompts)
    assert [key for key, _ in model.named_modules()] == [key for key, _ in untouched.named_modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in untouched.parameters()]


TAKES_PROMPTS = {
    "BEiT": lambda: build("BeitForImageClassification", **IMAGE, use_absolute_position_embeddings=True),
    "Pixio": lambda: build("PixioModel", **DINO, n_cls_tokens=3),
    "TIPSv2": lambda: build("Tipsv2VisionModel", **DINO),
    "OWLv2": lambda: dual("Owlv2Model", RIGHT)().vision_model,
    "ViT of one's own": lambda: nn.ModuleDict({"tower": build("ViTModel", **IMAGE)}),
}


@pytest.mark.parametrize("name", TAKES_PROMPTS)
@torch.no_grad()
def test_prompts_that_repeat_an_image_s_tokens_change_nothing(name):
    """Attention weighs every token twice then, which is as weighing it once."""

    def run(model):
        out = (model["tower"] if isinstance(model, nn.ModuleDict) else model)(pixel_values=pixels(1))
        return out.logits if "logits" in out else out.last_hidden_state

    base = TAKES_PROMPTS[name]()
    seen = []
    path = find_towers(base)["vision"].embeddings
    handle = base.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out))
    expected = run(base)
    handle.remove()
    (tokens,) = seen
    model = get_peft_model(base, NPTConfig(num_vision_tokens=tokens.shape[1], vision_depth=1)).get_base_model()
    (prompt,) = (p for key, p in model.named_parameters() if "ncgeo" in key)
    prompt.copy_(tokens[0])
    torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=1e-4)
    prompt.add_(torch.randn_like(prompt))
    assert not torch.allclose(run(model), expected, atol=1e-3)


# ---- pooled features, residual maps, heads ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dual("Aimv2Model", RIGHT), TEXT_TOWERS["GroupViT"][0]], ids=["AIMv2", "GroupViT"])
@torch.no_grad()
def test_a_feature_that_leaves_through_a_projection(make):
    base = make()
    expected = base.get_image_features(pixel_values=pixels()).pooler_output
    torch.testing.assert_close(ImageFeatures(base)(pixels()), expected)
    model = get_peft_model(base, CoPAConfig())
    (head,) = (p for key, p in model.named_parameters() if "image_head" in key)
    head.copy_(torch.randn_like(head))
    got = model.get_base_model().get_image_features(pixel_values=pixels()).pooler_output
    torch.testing.assert_close(got, expected @ head, atol=1e-4, rtol=1e-4)
    refusal(lambda: get_peft_model(make(), CoPAConfig(residual_adapters=True)), "residual", ValueError)


def retrieval() -> PreTrainedModel:
    text = {**BERT, "encoder_hidden_size": 32}
    return build("BlipForImageTextRetrieval", text_config=text, vision_config=IMAGE, image_text_hidden_size=16)


NO_FEATURE = {
    "Dinov2Backbone": (NO_IMAGE_PROMPTS["Dinov2Backbone"][0], "feature maps"),
    "DepthAnything": (depth_anything, "feature maps"),
    "LeViT": (lambda: build("LevitModel", **LEVIT), "no module outputs the mean"),
    "LLaVA": (llava, "not known"),
    "BLIP, retrieval": (retrieval, "not known"),
    "CLIPSeg, segmentation": (segmentation, "only together with a text"),
    "ViTMAE": (NO_IMAGE_PROMPTS["ViTMAE"][0], "not known"),
}


@pytest.mark.parametrize("name", NO_FEATURE)
def test_backbones_without_one_known_feature_are_refused(name):
    make, words = NO_FEATURE[name]
    assert type(make()).__name__ in refusal(lambda: get_peft_model(make(), CoPAConfig()), words, ValueError)
    refusal(lambda: adapt(make(), pixels(4), ["a", "b", "a", "b"]), words, ValueError)


def two_heads() -> PreTrainedModel:
    return build("LevitForImageClassificationWithTeacher", **LEVIT, num_labels=3)


def test_a_head_that_is_averaged_with_another_is_left_alone():
    model = two_heads()
    text = refusal(lambda: get_peft_model(model, PrototypeConfig()), "classifier_distill", ValueError)
    assert "LevitForImageClassificationWithTeacher" in text
    model.classifier, model.classifier_distill = nn.Linear(8, 3), nn.Linear(8, 3)
    assert linear_classifier(model) is None
    refusal(lambda: linear_parameter(model), "classifier_distill", ValueError)
    one = build("LevitForImageClassification", **LEVIT, num_labels=3)
    get_peft_model(one, PrototypeConfig())


def test_prototypes_are_refused_before_prompts_are_in():
    model = build("ViTForImageClassification", **IMAGE)
    model.classifier = nn.Sequential(nn.Flatten())
    names = [key for key, _ in model.named_modules()]
    refusal(lambda: get_peft_model(model, PrototypeConfig(num_vision_tokens=2)), "no linear layer", ValueError)
    assert [key for key, _ in model.named_modules()] == names


# ---- what is no image by itself -----------------------------------------------------------------------------------

NO_IMAGES = {
    "X-CLIP": (TEXT_TOWERS["X-CLIP"][0], "videos"),
    "VideoMAE": (lambda: build("VideoMAEForVideoClassification", **IMAGE, num_frames=2, num_labels=3), "videos"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_models_that_read_more_than_images_are_refused_for_training(name, tmp_path):
    make, words = NO_IMAGES[name]
    model = get_peft_model(make(), LoraConfig(target_modules="all-linear", r=2))
    processor, images = tiny_processor(), tiny_images(9)
    arguments = GeometryTrainingArguments(output_dir=str(tmp_path), report_to="none")
    refusal(lambda: GeometryTrainer(model, arguments, images, processing_class=processor), words)
    refusal(lambda: align_classifier(model, images, 0.5, processor), words)
    if hasattr(make(), "get_text_features"):
        refusal(lambda: ZeroShotClassifier(model, processor), words)


def test_a_retrieval_model_gives_no_text_features(tmp_path):
    model = get_peft_model(retrieval(), LoraConfig(target_modules=["projection"], r=2))
    arguments = GeometryTrainingArguments(output_dir=str(tmp_path), report_to="none")
    refusal(lambda: ZeroShotClassifier(model, tiny_processor()), "no text features", ValueError)
    refusal(
        lambda: GeometryTrainer(model, arguments, tiny_images(9), processing_class=tiny_processor()),
        "neither text features",
        ValueError,
    )


class OnePicture(CLIPModel):
    """A model of one's own that reads images as CLIP does, in a forward pass of its own."""

    def forward(self, pixel_values):
        return self.get_image_features(pixel_values=pixel_values).pooler_output


def test_a_child_of_clip_with_a_forward_pass_of_its_own_keeps_clips_feature():
    config = tiny_clip().config
    assert find_pooling(tiny(OnePicture, config)) == find_pooling(tiny_clip())
    model = tiny(OnePicture, config)
    with torch.no_grad():
        torch.testing.assert_close(ImageFeatures(model)(pixels()), model(pixels()))
