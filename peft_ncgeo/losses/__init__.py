"""Loss terms, one class for each published term. The formulas are in `peft_ncgeo.geometry`."""

from .base import GeometryBatch, Regularizer
from .copa import PrototypeImageContrast
from .cpt import ClusterCollapse, RotationStabilization
from .distillation import Distillation
from .fixed_prototypes import PrototypeSupCon
from .long_tail import LDAM, BalancedSoftmax, CrossEntropy, LogitAdjustment
from .multi_label import MultiLabelLoss
from .npt import GeometricDebiasing, LanguageCollapse, ModalityIsomorphism
from .prompt_ot import OTPreservation
from .promptsrc import PointwisePreservation
from .space_alignment import SpaceAlignment

__all__ = [
    "LDAM",
    "BalancedSoftmax",
    "ClusterCollapse",
    "CrossEntropy",
    "Distillation",
    "GeometricDebiasing",
    "GeometryBatch",
    "LanguageCollapse",
    "LogitAdjustment",
    "ModalityIsomorphism",
    "MultiLabelLoss",
    "OTPreservation",
    "PointwisePreservation",
    "PrototypeImageContrast",
    "PrototypeSupCon",
    "Regularizer",
    "RotationStabilization",
    "SpaceAlignment",
]
