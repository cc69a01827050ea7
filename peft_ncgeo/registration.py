"""Registration of the package's methods with PEFT, and of its image classifier with Transformers.

Only this file changes PEFT's enum and mappings.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForImageClassification

from .models.image_classifier import ImageClassifierConfig, ImageClassifierModel
from .tuners.adaptformer import AdaptFormerConfig, AdaptFormerModel
from .tuners.copa import CoPAConfig, CoPAModel
from .tuners.npt import NPTConfig, NPTModel
from .tuners.prototype import PrototypeConfig, PrototypeModel


def _add_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum, in memory: `register_peft_method` accepts only types of this enum."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    vars(member).update(_name_=name, _value_=name, __objclass__=PeftType, _sort_order_=len(PeftType._member_names_))
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    getattr(PeftType, "_hashable_values_", []).append(name)  # new Python versions look here first
    type.__setattr__(PeftType, name, member)  # Python 3.12 looks members up as plain class attributes
    return member


_METHODS: tuple[tuple[str, Any, Any], ...] = (
    ("ncgeo_npt", NPTConfig, NPTModel),
    ("ncgeo_prototype", PrototypeConfig, PrototypeModel),
    ("ncgeo_copa", CoPAConfig, CoPAModel),
    ("ncgeo_adaptformer", AdaptFormerConfig, AdaptFormerModel),
)


def register() -> None:
    """Register the package's methods and models with PEFT and Transformers; a second call changes nothing."""
    AutoConfig.register(ImageClassifierConfig.model_type, ImageClassifierConfig, exist_ok=True)
    # its subclass ImageClassifier may be registered already, and stays
    if ImageClassifierConfig not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        AutoModelForImageClassification.register(ImageClassifierConfig, ImageClassifierModel)
    # PEFT reads a property that Transformers has renamed from every model that it wraps; users cannot change that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    for name, config_cls, model_cls in _METHODS:
        peft_type = _add_peft_type(name.upper())
        if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
