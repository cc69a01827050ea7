from .config import PrototypeConfig
from .model import PrototypeModel

__all__ = ["PrototypeConfig", "PrototypeModel"]
