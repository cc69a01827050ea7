"""Heads on cached features of a dual encoder, fitted on a few labelled images."""

from .base import FeatureHead, Support
from .clap import CLAP
from .copa import CoPA
from .gaussian_discriminant import GaussianDiscriminant
from .image_only import LinearProbe, NearestClassMean
from .lp_plus_plus import LPPlusPlus
from .tip_adapter import TipAdapter

HEADS: dict[str, type[FeatureHead]] = {
    head.__name__: head for head in (TipAdapter, GaussianDiscriminant, LPPlusPlus, CLAP, NearestClassMean, LinearProbe)
}

__all__ = [
    "CLAP",
    "HEADS",
    "CoPA",
    "FeatureHead",
    "GaussianDiscriminant",
    "LPPlusPlus",
    "LinearProbe",
    "NearestClassMean",
    "Support",
    "TipAdapter",
]
