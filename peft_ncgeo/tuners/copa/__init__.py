from .config import CoPAConfig
from .layer import CoPALayer, Residual, ResidualConvolution, ResidualLinear
from .model import CoPAModel

__all__ = [
    "CoPAConfig",
    "CoPALayer",
    "CoPAModel",
    "Residual",
    "ResidualConvolution",
    "ResidualLinear",
]
