"""Adaptation to a few labelled images."""

from ..classifiers.heads import CLAP, CoPA, GaussianDiscriminant, LPPlusPlus, TipAdapter

__all__ = ["CLAP", "CoPA", "GaussianDiscriminant", "LPPlusPlus", "TipAdapter"]
