"""The capabilities that are tried, and the kinds of model they are tried on."""

from __future__ import annotations

from .backbones import backbones
from .classifiers import classifiers
from .dual_encoders import dual_encoders
from .specs import Spec
from .training import train, train_ce, train_prompts, train_prototypes
from .tuners import adaptformer, copa, prototypes, text_prompts, vision_prompts
from .uses import align, pipe_lora, pipe_prompts, zero_shot_lora, zero_shot_prompts

TRIES = {
    "a_vision": (vision_prompts, {"dual", "classifier", "backbone"}),
    "a_text": (text_prompts, {"dual"}),
    "b_prototype": (prototypes, {"classifier"}),
    "b_copa": (copa, {"dual", "classifier", "backbone"}),
    "b_adaptformer": (adaptformer, {"dual", "classifier", "backbone"}),
    "c_train_lora_ce": (train_ce, {"dual", "classifier"}),
    "c_train_lora": (train, {"dual", "classifier"}),
    "c_train_prompts": (train_prompts, {"dual", "classifier"}),
    "c_train_prototypes": (train_prototypes, {"classifier"}),
    "d_zero_lora": (zero_shot_lora, {"dual"}),
    "d_zero_prompts": (zero_shot_prompts, {"dual"}),
    "e_align": (align, {"dual", "classifier"}),
    "f_pipe_lora": (pipe_lora, {"dual", "classifier"}),
    "f_pipe_prompts": (pipe_prompts, {"dual", "classifier"}),
}


def specs() -> list[Spec]:
    """Every model that the installed Transformers has."""
    return [spec for spec in [*dual_encoders(), *classifiers(), *backbones()] if spec.family]
