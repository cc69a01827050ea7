"""Pure tensor functions: no modules, no Transformers."""

from .collapse import NeuralCollapse
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
    "minority_margin",
    "modality_gap",
    "optimal_exponent",
    "simplex_etf",
    "slerp",
    "transport_cost",
    "transport_plan",
]
