from .config import COPA_TEMPERATURE, CoPAConfig
from .layer import CoPALayer, Residual, ResidualConvolution, ResidualLinear
from .model import CoPAModel

__all__ = [
    "COPA_TEMPERATURE",
    "CoPAConfig",
    "CoPALayer",
    "CoPAModel",
    "Residual",
    "ResidualConvolution",
    "ResidualLinear",
]
