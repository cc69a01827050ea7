"""Loss terms, one class per published term. Formulas live in `peft_ncgeo.geometry`."""

from .base import GeometryBatch, Regularizer
from .classification import CrossEntropy
from .transport import OTPreservation

__all__ = ["CrossEntropy", "GeometryBatch", "OTPreservation", "Regularizer"]
