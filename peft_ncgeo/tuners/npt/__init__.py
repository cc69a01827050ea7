from .config import NPTConfig
from .model import NPTModel

__all__ = ["NPTConfig", "NPTModel"]
