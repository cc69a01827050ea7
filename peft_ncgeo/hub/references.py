"""Phrases for the parts of a method in a card, and the papers that they come from."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..markdown import code_cell
from .record import Component, TrainingRecord


class Reference(NamedTuple):
    """A phrase for a sentence, and its keys in `references.bib`."""

    phrase: str
    keys: tuple[str, ...] = ()


_PROMPTS = {  # (text, vision) -> the adapter
    (True, True): Reference("deep vision-language prompts", ("khattak2023maple",)),
    (True, False): Reference("text prompts", ("zhou2022coop",)),
    (False, True): Reference("visual prompts", ("jia2022vpt",)),
}
_COPA = Reference("a head each for prototypes and images (CoPA)", ("tian2024copa",))
_ASYMMETRIC = Reference("the asymmetric loss of each class (ASL)", ("ridnik2021asl",))
_PARTS = {  # config, loss or callback -> its phrase and papers
    "LoraConfig": Reference("low-rank updates", ("hu2022lora",)),
    "AdaptFormerConfig": Reference(
        "bottleneck adapters beside the MLPs (AdaptFormer, LIFT)", ("chen2022adaptformer", "shi2024lift")
    ),
    "PrototypeConfig": Reference("fixed class prototypes in place of a trained head", ("gill2023prototypes",)),
    "OTPreservation": Reference("optimal transport to the frozen model (Prompt-OT)", ("chen2025promptot",)),
    "PointwisePreservation": Reference("consistency with the frozen model (PromptSRC)", ("khattak2023promptsrc",)),
    "Distillation": Reference("class probabilities of a teacher (PromptKD)", ("li2024promptkd",)),
    "PromptAveraging": Reference("averaged prompts (PromptSRC)", ("khattak2023promptsrc",)),
    "LanguageCollapse": Reference("texts drawn to a simplex ETF (NPT)", ("zhu2023npt",)),
    "GeometricDebiasing": Reference("class means drawn to an ETF (NPT)", ("zhu2023npt",)),
    "ModalityIsomorphism": Reference("images drawn to their texts (NPT)", ("zhu2023npt",)),
    "ClusterCollapse": Reference("an ETF within clusters of texts (CPT)", ("guo2026cpt",)),
    "RotationStabilization": Reference("stabilised text directions (CPT)", ("guo2026cpt",)),
    "SpaceAlignment": Reference("space alignment (SpA-Reg)", ("wang2025spacealignment",)),
    "SlerpAlignment": Reference("space alignment (SpA-SLERP)", ("wang2025spacealignment",)),
    "GradientProjection": Reference("space alignment (SpA-Proj)", ("wang2025spacealignment",)),
    "PrototypeSupCon": Reference("supervised contrast with prototypes", ("gill2023prototypes", "khosla2020supcon")),
    "PrototypeImageContrast": Reference("contrast of prototypes and images (CoPA)", ("tian2024copa",)),
    "TipAdapter": Reference("a cache of support features (Tip-Adapter)", ("zhang2022tip",)),
    "GaussianDiscriminant": Reference("Gaussian discriminant analysis", ("wang2024gda",)),
    "LPPlusPlus": Reference("a linear probe with weighted texts (LP++)", ("huang2024lppp",)),
    "CLAP": Reference("a linear probe held to the texts (CLAP)", ("silvarodriguez2024clap",)),
    "NearestClassMean": Reference("the nearest class mean"),
    "LinearProbe": Reference("a linear probe"),
    "LogitAdjustment": Reference("logit adjustment", ("menon2021logit",)),
    "BalancedSoftmax": Reference("balanced softmax", ("ren2020balanced",)),
    "MultiLabelLoss": Reference("binary cross-entropy of each class"),
    "MixUp": Reference("mixed images (mixup)", ("zhang2018mixup",)),
    "CutMix": Reference("mixed images (CutMix)", ("yun2019cutmix",)),
    "LDAM": Reference("label-distribution-aware margins", ("cao2019ldam",)),
}


def adapter_reference(adapter: Component) -> Reference:
    """Return the reference of a PEFT config; for an unknown config, its class name."""
    settings = adapter.settings
    if adapter.name == "CoPAConfig":
        shared = settings.get("shared", False)
        found = Reference("one head for prototypes and images (URL)", ("li2021url",)) if shared else _COPA
        residual = settings.get("residual_adapters", False)
        return (
            Reference(f"{found.phrase} and residual adapters (TSA)", (*found.keys, "li2022tsa")) if residual else found
        )
    prompts = bool(settings.get("num_text_tokens")), bool(settings.get("num_vision_tokens"))
    own = _PARTS.get(adapter.name)
    if any(prompts) and own:
        return Reference(f"{_PROMPTS[prompts].phrase} and {own.phrase}", (*_PROMPTS[prompts].keys, *own.keys))
    if any(prompts):
        return _PROMPTS[prompts]
    return own or Reference(code_cell(adapter.name))


def term_references(record: TrainingRecord) -> list[Reference]:
    """Return the references of the losses and callbacks of a record that are known here."""
    return [
        _ASYMMETRIC if term.settings.get("asymmetric") else _PARTS[term.name]
        for term in record.terms
        if term.name in _PARTS
    ]


def bibtex(record: TrainingRecord) -> list[str]:
    """Return the BibTeX entries of all methods of a record, each once."""
    references = [adapter_reference(record.adapter), *term_references(record)]
    return [_entries()[key] for key in dict.fromkeys(key for reference in references for key in reference.keys)]


@lru_cache(maxsize=1)
def _entries() -> dict[str, Any]:
    text = Path(__file__).with_name("references.bib").read_text(encoding="utf-8")
    return {re.findall(r"\{([^,]+),", entry)[0]: entry.strip() for entry in re.split(r"\n(?=@)", text)}
