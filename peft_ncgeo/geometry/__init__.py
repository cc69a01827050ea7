"""Geometry of features and classifiers, as pure functions of tensors."""

from .collapse import NeuralCollapse
from .contrast import loss_against_gap, prototype_cross_entropy, prototype_image_contrast, shared_head_gap_bound
from .exponent import error_exponent, exponent_ratio, optimal_exponent
from .prototypes import minority_margin
from .simplex import gram_distance, simplex_etf
from .sphere import modality_gap, slerp
from .transport import transport_cost, transport_plan

__all__ = [
    "NeuralCollapse",
    "error_exponent",
    "exponent_ratio",
    "gram_distance",
    "loss_against_gap",
    "minority_margin",
    "modality_gap",
    "optimal_exponent",
    "prototype_cross_entropy",
    "prototype_image_contrast",
    "shared_head_gap_bound",
    "simplex_etf",
    "slerp",
    "transport_cost",
    "transport_plan",
]
