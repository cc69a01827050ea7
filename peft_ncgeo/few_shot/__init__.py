"""Adaptation to a few labelled images."""

from ..classifiers.heads import (
    CLAP,
    CoPA,
    GaussianDiscriminant,
    LinearProbe,
    LPPlusPlus,
    NearestClassMean,
    TipAdapter,
)

__all__ = ["CLAP", "CoPA", "GaussianDiscriminant", "LPPlusPlus", "LinearProbe", "NearestClassMean", "TipAdapter"]
