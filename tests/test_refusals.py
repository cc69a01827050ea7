"""Errors that stand for themselves: one line each, which names the thing, where no other test comes by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import nn
from transformers import CLIPConfig, CLIPModel

from peft_ncgeo import CoPAConfig, GeometryTrainer, NPTConfig, PrototypeConfig, adapt
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.data import DatasetSource, class_prompts
from peft_ncgeo.data.processors import input_size
from peft_ncgeo.evaluation import FewShotClassifier
from peft_ncgeo.geometry.heads import Heads
from peft_ncgeo.geometry.simplex import clustered_etf_deviation
from peft_ncgeo.geometry.transport import class_transport_plans
from peft_ncgeo.hub import hypothesis_template, load_adapter
from peft_ncgeo.hub.few_shot_record import record_few_shot
from peft_ncgeo.hub.push import _base_on_hub, _check_base
from peft_ncgeo.loading.hub_errors import hub_errors
from peft_ncgeo.losses import GeometryBatch, PointwisePreservation, Regularizer
from peft_ncgeo.models.towers import find_residual_places
from peft_ncgeo.training.state.class_means import ClassMeans
from peft_ncgeo.training.state.files import load_state, save_state
from peft_ncgeo.tuners.npt import NPTModel
from peft_ncgeo.validation import OF_THE_MACHINE

from .conftest import tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def test_text_prompts_need_a_first_token():
    tokenizer = tiny_processor().tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert class_prompts(["cat"], "a photo of a {}.", 0, tokenizer).input_ids.shape == (1, 7)
    with pytest.raises(ValueError, match=r"tokenizer.*one \[BOS\]"):
        class_prompts(["cat"], "a photo of a {}.", 2, tokenizer)


def test_an_image_processor_says_its_size():
    assert input_size(SimpleNamespace(size={"shortest_edge": 7})) == (7, 7)
    with pytest.raises(ValueError, match="SimpleNamespace.*not.*images"):
        input_size(SimpleNamespace(size={"longest_edge": 7}))


def test_class_names_are_words():
    source = DatasetSource(path="somewhere", num_classes=2)
    with pytest.raises(ValueError, match="somewhere.*class n01440764.*WordNet.*classes"):
        source.prepare(tiny_images(4, ["tench", "n01440764"]))


def test_prototypes_stand_in_for_a_linear_head():
    model = tiny_vit_classifier()
    model.classifier = nn.Sequential(nn.LayerNorm(32))
    with pytest.raises(ValueError, match="Sequential.*no.*not"):
        get_peft_model(model, PrototypeConfig())


class Mixer(nn.Module):
    """A vision tower whose layers mix tokens by something else than attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, 4, 2)
        self.layers = nn.ModuleList([nn.ModuleDict({"mixing": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)})])


def test_residual_adapters_stand_beside_attention_and_mlp():
    with pytest.raises(ValueError, match="layers.0.*Mixer.*no.*MLP.*adapters"):
        find_residual_places(Mixer())


def test_a_term_defines_its_formula():
    with pytest.raises(NotImplementedError, match=r"Half must define forward\(batch\)"):
        type("Half", (Regularizer,), {})(weight=1.0)(GeometryBatch())


def test_settings_of_formulas_are_known():
    with pytest.raises(ValueError, match="kl_reduction='sum' must be 'batchmean' or 'mean'"):
        PointwisePreservation(weight=1.0, kl_reduction="sum")
    with pytest.raises(ValueError, match="reduction='max' must be 'mean' or 'sum'"):
        clustered_etf_deviation(torch.eye(3), torch.tensor([0, 0, 1]), "max")


def test_many_small_transport_problems_are_finite():
    cost = torch.tensor([[[1.0, float("inf")], [0.0, 1.0]]])
    with pytest.raises(ValueError, match="cost has non-finite entries"):
        class_transport_plans(cost, torch.full((1, 2), 0.5), torch.full((1, 2), 0.5))


def test_nothing_was_merged():
    model = get_peft_model(tiny_clip(), NPTConfig(num_vision_tokens=2))
    with pytest.raises(ValueError, match="never"):
        model.unmerge_adapter()


def test_class_means_stay_finite():
    means = ClassMeans(2)
    with pytest.raises(ValueError, match="image_features.*class"):
        means.update(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]))
    assert means.means.shape == (2, 0)


def test_the_trainer_needs_a_processor():
    model = get_peft_model(tiny_clip(), NPTConfig(num_vision_tokens=2))
    with pytest.raises(ValueError, match="GeometryTrainer needs processing_class, the model's processor"):
        GeometryTrainer(model, train_dataset=tiny_images())


def test_class_names_need_a_tokenizer():
    model = get_peft_model(tiny_clip(), NPTConfig(num_vision_tokens=2))
    with pytest.raises(ValueError, match="processing_class.*no tokenizer.*class names.*CLIPPr"):
        GeometryTrainer(model, train_dataset=tiny_images(), processing_class=tiny_processor().image_processor)


def test_a_template_for_prompts_needs_a_tokenizer(tmp_path):
    config = NPTConfig(num_text_tokens=2, base_model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="No tokenizer.*adapter.*tokenizer"):
        hypothesis_template(config)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapters_go_into_the_model_and_not_into_what_holds_it():
    model = get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"The.*PeftModel.*model.get_base_model"):
        NPTModel(model, NPTConfig(num_vision_tokens=2), "default")


def test_a_record_is_of_the_classifiers_classes():
    model = get_peft_model(tiny_vit(), CoPAConfig())
    heads = Heads.identity(torch.zeros(1, 32))
    classifier = FewShotClassifier(model, heads, torch.eye(2, 32), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"classes \['cat', 'bird'\] are not the classifier's \['cat', 'dog'\]"):
        record_few_shot(classifier, tiny_images(4, ["cat", "bird"]))


def test_the_state_of_another_number_of_classes_is_refused(tmp_path):
    means = ClassMeans(2)
    means.update(torch.eye(2), torch.tensor([0, 1]))
    save_state([means], tmp_path)
    with pytest.raises(ValueError, match="does not fit class_means.*2 classes.*3"):
        load_state([ClassMeans(3)], tmp_path)


def test_errors_of_ones_own_are_not_the_hubs():
    with pytest.raises(KeyError, match="own"), hub_errors("The upload failed"):
        raise KeyError("own")
    with pytest.raises(OSError, match="^The upload failed: the file broke off$"), hub_errors("The upload failed"):
        raise RuntimeError("\nthe file broke off\nand more")


def test_a_base_model_that_cannot_be_looked_up_is_no_wrong_name(monkeypatch):
    def fail(self, name: str) -> None:
        raise OSError("the line broke")

    monkeypatch.setattr("peft_ncgeo.hub.push.HfApi.model_info", fail)
    with pytest.raises(OSError, match="^base_model_id='user/base' cannot"):
        _base_on_hub("user/base", True, None)


def test_a_base_model_of_another_size_is_refused(tmp_path):
    tiny_clip().save_pretrained(tmp_path)
    config = CLIPConfig.from_pretrained(tmp_path)
    config.vision_config.num_hidden_layers += 1
    config.save_pretrained(tmp_path)
    model = get_peft_model(tiny_clip(), NPTConfig(num_vision_tokens=2))
    with pytest.raises(ValueError, match="differs from the model in num_hidden_layers"):
        _check_base(model, str(tmp_path), None)


@pytest.mark.parametrize("error", [RuntimeError, ImportError, MemoryError, *OF_THE_MACHINE[2:]])
def test_an_error_of_the_machine_is_none_of_the_file_or_the_pixels(error, tmp_path, monkeypatch):
    get_peft_model(tiny_clip(), NPTConfig(num_vision_tokens=2)).save_pretrained(tmp_path)

    def fail(*args, **kwargs) -> None:
        raise error("no memory")

    monkeypatch.setattr(PeftModel, "from_pretrained", fail)
    with pytest.raises(error, match="^no memory$"):
        load_adapter(tmp_path, tiny_clip())
    if error is not RuntimeError:  # torch's of channels is one
        monkeypatch.setattr(CLIPModel, "from_pretrained", fail)
        with pytest.raises(error, match="^no memory$"):
            load_adapter(tmp_path, "base")
        backbone = tiny_vit()
        monkeypatch.setattr(backbone, "forward", fail)
        with pytest.raises(error, match="^no memory$"):
            ImageFeatures(backbone).embed(torch.zeros(1, 3, 16, 16))


NAMES = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2")
NARROW = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]  # older torch has the first two


def narrow(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As many numbers of 8 bits, or half as many bytes of two numbers."""
    if dtype.itemsize == 1 and "float8" in str(dtype):
        return torch.ones_like(tensor).to(dtype)
    return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] // 2, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("config", [NPTConfig(num_vision_tokens=2), LoraConfig(target_modules=["q_proj"])])
def test_numbers_of_less_than_sixteen_bits_are_refused(config, dtype, tmp_path):
    get_peft_model(tiny_clip(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: narrow(tensor, dtype) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="is of F[48].*16 bits"):
        load_adapter(tmp_path, tiny_clip())
    if isinstance(config, NPTConfig):
        with pytest.raises(ValueError, match=r"16 bits|does not fit"):
            PeftModel.from_pretrained(tiny_clip(), tmp_path)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_prototypes_of_less_than_sixteen_bits_are_refused(dtype, tmp_path):
    model = get_peft_model(tiny_vit(), CoPAConfig())
    adapt(model, torch.randn(4, 3, 16, 16), [0, 1, 0, 1], steps=1).save_pretrained(tmp_path)
    prototypes = load_file(tmp_path / "prototypes.safetensors")["prototypes"]
    save_file({"prototypes": narrow(prototypes, dtype)}, tmp_path / "prototypes.safetensors", {"classes": "[0, 1]"})
    with pytest.raises(ValueError, match="prototypes is of F[48].*16 bits"):
        FewShotClassifier.from_pretrained(tmp_path, tiny_vit())


def test_a_combination_that_cannot_be_added_leaves_no_config_behind(monkeypatch):
    model = get_peft_model(tiny_clip(), NPTConfig(num_vision_tokens=2), adapter_name="one")
    model.add_adapter("two", NPTConfig(num_vision_tokens=2))

    def fail(self, *args) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(model.base_model), "inject_adapter", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both")
    assert list(model.peft_config) == ["one", "two"]
