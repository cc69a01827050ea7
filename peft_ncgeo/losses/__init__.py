"""Loss terms, one class per published term. Formulas live in `peft_ncgeo.geometry`."""

from .alignment import SpaceAlignment
from .base import GeometryBatch, Regularizer
from .classification import LDAM, BalancedSoftmax, CrossEntropy, LogitAdjustment
from .contrastive import PrototypeImageContrast, PrototypeSupCon
from .neural_collapse import ClusterCollapse, GeometricDebiasing, LanguageCollapse, ModalityIsomorphism
from .preservation import PointwisePreservation, RotationStabilization
from .transport import OTPreservation

__all__ = [
    "LDAM",
    "BalancedSoftmax",
    "ClusterCollapse",
    "CrossEntropy",
    "GeometricDebiasing",
    "GeometryBatch",
    "LanguageCollapse",
    "LogitAdjustment",
    "ModalityIsomorphism",
    "OTPreservation",
    "PointwisePreservation",
    "PrototypeImageContrast",
    "PrototypeSupCon",
    "Regularizer",
    "RotationStabilization",
    "SpaceAlignment",
]
