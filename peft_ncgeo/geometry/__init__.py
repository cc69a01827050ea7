"""Pure tensor functions: no modules, no Transformers."""

from .collapse import NeuralCollapse
from .simplex import gram_distance, simplex_etf
from .sphere import modality_gap
from .transport import transport_cost, transport_plan

__all__ = ["NeuralCollapse", "gram_distance", "modality_gap", "simplex_etf", "transport_cost", "transport_plan"]
