"""Write adapters, classifiers, checkpoints and recipes of every kind with what they say, as files for later versions.

Run with an old version of the package, beside the versions that `constraints.txt` names:

    git worktree add ../old 5f04484     # version 0.1.0, or its tag
    PYTHONPATH=../old python tests/old_files/write.py tests/old_files/v0.1.0

The folder must not exist. Bases are stored, so that a test draws no random numbers again; what nothing reads when a
folder is loaded (PEFT's README, pickled arguments, processors beside a checkpoint) is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import (  # beside this script
    BASES,
    LORA,
    NAMES,
    NEW,
    SAVED_AT,
    TRAININGS,
    answers,
    base,
    compared,
    described,
    given_prototypes,
    labelled,
    losses,
    parts,
    pictures,
    token_ids,
    trainer,
)
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

import peft_ncgeo
from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig, ZeroShotClassifier, adapt
from peft_ncgeo.hub import export_classifier, hypothesis_template, save_adapter
from peft_ncgeo.protocols import EpisodeResults
from peft_ncgeo.training import Recipe, align_classifier

SIZE = 8  # of the images, in pixels
TOWER = {"intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 8}
IMAGES = {"image_size": SIZE, "patch_size": 4}
BOTH: Any = {"num_text_tokens": 2, "num_vision_tokens": 2, "text_init": "a photo"}
# adapter -> its base model and its config
ADAPTERS: dict[str, tuple[str, Callable[[], PeftConfig]]] = {
    "npt_coop": ("clip", partial(NPTConfig.coop, num_text_tokens=4)),
    "npt_text": ("clip", partial(NPTConfig, num_text_tokens=3, text_depth=2, text_init="a photo of")),
    "npt_vision": ("clip", partial(NPTConfig.vpt, num_vision_tokens=3)),
    "npt_both": ("clip", partial(NPTConfig.ivlp, text_depth=2, vision_depth=3)),
    "npt_deep": ("clip", NPTConfig.prompt_ot),
    "npt_coupled": ("clip", partial(NPTConfig.maple, text_depth=3, vision_depth=2)),
    "npt_coupled_later": ("clip", partial(NPTConfig.npt, first_layer=1)),
    "npt_first_layer": ("clip", partial(NPTConfig, **BOTH, text_depth=2, vision_depth=2, first_layer=1)),
    "npt_unpacked": ("clip", partial(NPTConfig, **BOTH, pack_text=False)),
    "npt_excluded": ("clip", partial(NPTConfig, num_text_tokens=2, exclude_modules=["vision_model"])),
    "npt_ids_and_template": (
        "clip",
        partial(NPTConfig, num_text_tokens=3, text_init=[6, 7], template="the {}, of the tree.", init_std=0.1),
    ),
    "npt_text_tower": ("clip text tower", partial(NPTConfig, num_text_tokens=2, text_depth=2, text_init="a photo")),
    "npt_vision_tower": ("clip vision tower", partial(NPTConfig.vpt, num_vision_tokens=2)),
    "npt_vit": ("vit", partial(NPTConfig.vpt, num_vision_tokens=2, vision_depth=2)),
    "npt_vit_later": ("vit", partial(NPTConfig, num_vision_tokens=2, vision_depth=2, first_layer=1)),
    "npt_vit_head": ("vit", partial(NPTConfig.vpt, num_vision_tokens=2, modules_to_save=["classifier"])),
    "prototype_etf": ("vit", partial(PrototypeConfig, projection_dim=6)),
    "prototype_margin": (
        "vit",
        partial(PrototypeConfig, projection_dim=6, geometry="minority_margin", class_counts=[9, 5, 4, 2, 1]),
    ),
    "prototype_given": ("vit", lambda: PrototypeConfig(geometry=given_prototypes(), temperature=0.5)),
    "prototype_trainable": ("vit", partial(PrototypeConfig, projection_dim=4, trainable=True)),
    "prototype_prompts": ("vit", partial(PrototypeConfig, projection_dim=5, num_vision_tokens=2, vision_depth=2)),
    "prototype_three": ("vit", partial(PrototypeConfig, projection_dim=4, num_classes=3)),
    "copa_clip": ("clip", CoPAConfig),
    "copa_clip_residual": ("clip", partial(CoPAConfig, residual_adapters=True)),
    "lora_vit_head": ("vit", partial(LORA, modules_to_save=["classifier"])),
}
# a few-shot classifier -> its base model, its config, and the names of its classes
FEW_SHOT: dict[str, tuple[str, Callable[[], PeftConfig], list[Any]]] = {
    "copa": ("vit backbone", CoPAConfig, ["heron", "owl", "wren"]),
    "url": ("vit backbone", partial(CoPAConfig, shared=True), [3, 7, 11]),
    "residual_vit": ("vit backbone", partial(CoPAConfig, residual_adapters=True), ["heron", "owl", "wren"]),
    "residual_resnet": ("resnet", partial(CoPAConfig, residual_adapters=True), [0, 1]),
    "copa_clip": ("clip", partial(CoPAConfig, temperature=0.3), ["heron", "owl"]),
}


def _wave(*shape: int, phase: float = 0.0) -> Tensor:
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.37 * n * n + 0.9 * n + phase).reshape(shape)


@torch.no_grad()
def _far(model: Any, by: float = 0.3) -> Any:
    """The model with what it trains far from its start."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * by)
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["x", "a", "photo", "of", "the", "tree", ".", ",", *dict.fromkeys(" ".join(NAMES).split())]
    vocabulary = {"<pad>": 0, "<bos>": 1, "<unk>": 2, "<eos>": 3, **{word: 5 + i for i, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=14)


def _write_bases(folder: Path) -> None:
    text = {"vocab_size": 28, "max_position_embeddings": 14, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    text |= {**TOWER, "hidden_size": 12}
    vit = {**TOWER, **IMAGES, "hidden_size": 16}
    sizes = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=vit, projection_dim=8)),
        "vit": ViTForImageClassification(ViTConfig(**vit, num_labels=len(NAMES))),
        "resnet": ResNetModel(ResNetConfig(**sizes)),
    }
    images = CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    for name, model in made.items():
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:  # far larger than at the start of pre-training, so that every layer matters
                    weight.normal_(0, 1.3 * weight[0].numel() ** -0.5)
        model.save_pretrained(folder / "bases" / name)
        (CLIPProcessor(images, _tokenizer()) if name == "clip" else images).save_pretrained(folder / "bases" / name)


def _write_inputs(folder: Path) -> None:
    images = {
        part: (127.5 + 90 * _wave(count, SIZE, SIZE, 3, phase=phase) + 35 * _wave(count, 1, 1, 3, phase=2.0)).round()
        for part, count, phase in (("train", 12, 0.0), ("new", 4, 1.0))
    }
    inputs = {f"{part}.images": values.to(torch.uint8) for part, values in images.items()}
    save_file({**inputs, "pixel_values": _wave(3, 3, SIZE, SIZE, phase=2.0).float()}, folder / "inputs.safetensors")


def _tidy(folder: Path, names: Sequence[str] = ("README.md", "training_args.bin")) -> None:
    """Take out what nothing reads when the folder is loaded."""
    for name in names:
        for file in folder.rglob(name):
            file.unlink()


class _Kept:
    """Outputs by the name of what said them, and words and lists beside the tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors, self.words = folder, {}, {}

    def add(self, name: str, said: dict[str, Tensor]) -> None:
        self.tensors |= {f"{name}/{what}": value.contiguous().clone() for what, value in said.items()}

    def write(self) -> None:
        save_file(self.tensors, self.folder / "outputs.safetensors")
        (self.folder / "outputs.json").write_text(json.dumps(self.words, indent=1, sort_keys=True) + "\n")


def _write_adapters(folder: Path, kept: _Kept) -> None:
    for name, (kind, config) in ADAPTERS.items():
        texts = token_ids(config(), folder)
        before = answers(base(kind, folder), texts, folder)
        torch.manual_seed(2)
        model = _far(get_peft_model(base(kind, folder), config()))
        if name == "npt_vit_head":
            processor = AutoImageProcessor.from_pretrained(str(folder / "bases" / "vit"))
            align_classifier(model, labelled(folder), fraction=0.3, processing_class=processor)
        said = answers(model, texts, folder)
        same = [what for what, value in said.items() if value.shape == before[what].shape]
        assert any((said[what] - before[what]).abs().max() > 0.01 for what in same) or not same, name
        kept.add(f"adapters/{name}", said)
        kept.add(f"adapters/{name}", texts)
        model.save_pretrained(str(folder / "adapters" / name))
        kept.words[f"adapters/{name}"] = kind
    model = get_peft_model(base("clip", folder), ADAPTERS["npt_both"][1](), adapter_name="second")
    model.add_adapter("third", ADAPTERS["npt_both"][1]())
    for name, other in (("second", 1), ("third", 2)):
        model.set_adapter(name)
        _far(model, 0.3 * other)
    model.add_weighted_adapter(["second", "third"], [0.4, 0.6], "both", combination_type="slerp")
    texts = token_ids(model.peft_config["second"], folder)
    model.save_pretrained(str(folder / "adapters"), selected_adapters=["second", "both"])
    for name in ("second", "both"):
        model.set_adapter(name)
        kept.add(f"adapters/{name}", {**answers(model.eval(), texts, folder), **texts})
        kept.words[f"adapters/{name}"] = "clip"
    _tidy(folder / "adapters")


def _write_classifiers(folder: Path, kept: _Kept) -> None:
    images = pictures(folder, "train")
    for name, (kind, config, classes) in FEW_SHOT.items():
        place = str(folder / "bases" / BASES[kind][1])
        processor = AutoImageProcessor.from_pretrained(place)
        torch.manual_seed(2)
        own = "birds" if name == "residual_vit" else "default"
        model = get_peft_model(base(kind, folder), config(), adapter_name=own)
        labels = [classes[i % len(classes)] for i in range(12)]
        made = adapt(model, images[:12], labels, steps=5, lr=0.3, adapter_lr=1.0, processor=processor)
        if own == "birds":
            save_adapter(made, folder / "few_shot" / name, base_model_id="user/base", figure=None)
        else:
            made.save_pretrained(folder / "few_shot" / name)
        new = pictures(folder, "new")
        kept.add(f"few_shot/{name}", {"probabilities": made.predict_proba(new)})
        kept.words[f"few_shot/{name}"] = {"base": kind, "predicted": made.predict(new)}
    _tidy(folder / "few_shot")
    model = PeftModel.from_pretrained(base("clip", folder), str(folder / "adapters" / "npt_both"))
    processor = AutoProcessor.from_pretrained(str(folder / "bases" / "clip"))
    export_classifier(model, NEW, folder / "export", processor)
    kept.add(
        "export", {"probabilities": ZeroShotClassifier(model, processor).predict_proba(pictures(folder, "new"), NEW)}
    )
    _tidy(folder / "export")


def _write_trainings(folder: Path, kept: _Kept) -> None:
    for name in TRAININGS:
        with tempfile.TemporaryDirectory() as output:
            run = trainer(name, folder, Path(output))
            run.train()
            shutil.copytree(Path(output) / f"checkpoint-{SAVED_AT}", folder / "checkpoints" / name)
        kept.words[f"checkpoints/{name}"] = losses(run)
        run.model.eval().save_pretrained(str(folder / "trained" / name))
        kept.add(f"trained/{name}", answers(run.model, token_ids(run.model.peft_config["default"], folder), folder))
        if name == "class_means":  # with all that is published: processor, card, and the record of the training
            record = run.record()
            save_adapter(run.model, folder / "published", run.processing_class, "user/tiny-clip", record, figure=None)
            (folder / "published" / "record.json").write_text(json.dumps(record.to_dict(), indent=1) + "\n")
        if name == "averaging":  # as the trainer leaves it
            run.save_model(str(folder / "trainer_output"))
            kept.words["trainer_output"] = hypothesis_template(folder / "trainer_output")
    processor = ("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
    _tidy(folder / "checkpoints", ("README.md", "training_args.bin", *processor))
    _tidy(folder / "trained")
    _tidy(folder / "trainer_output")


def _write_recipes(folder: Path, kept: _Kept) -> None:
    recipes = Path(peft_ncgeo.__file__).parents[1] / "examples" / "recipes"
    shutil.copytree(recipes, folder / "recipes")
    for file in sorted((folder / "recipes").rglob("*.yaml")):
        recipe, name = Recipe.read(file), str(file.relative_to(folder))
        found = {key: [described(part) for part in made] for key, made in parts(recipe).items()}
        kept.words[name] = {**found, "args": recipe.args}


def _write_results(folder: Path, kept: _Kept) -> None:
    keys = [(domain, method, i) for domain in ("emoji", "digits") for method in ("CoPA", "URL") for i in range(3)]
    numbers = (50 + 40 * _wave(len(keys), 6)).round(decimals=3).tolist()
    columns = ("accuracy", "gap_before", "gap_after", "nc1_before", "nc1_after", "seconds")
    rows = [
        {"domain": domain, "method": method, "episode": i, **dict(zip(columns, row, strict=True))}
        for (domain, method, i), row in zip(keys, numbers, strict=True)
    ]
    results = EpisodeResults(rows, ["emoji", "digits"], ["CoPA", "URL"], ["emoji"], "tiny")
    results.save(folder / "episodes")
    kept.words["episodes"] = compared(results)


def write(folder: Path) -> None:
    """Write everything.

    Raises:
        FileExistsError: the folder exists.
    """
    folder.mkdir(parents=True)
    os.chdir(folder)  # adapters name their base model's folder: no path of this machine
    here = Path()
    kept = _Kept(here)
    _write_bases(here)
    _write_inputs(here)
    for part in (_write_adapters, _write_classifiers, _write_trainings, _write_recipes, _write_results):
        part(here, kept)
    kept.write()


if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)
    print(f"Writing with {Path(peft_ncgeo.__file__).parent}")
    write(Path(sys.argv[1]))
