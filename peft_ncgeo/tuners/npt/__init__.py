from .config import NPTConfig
from .layer import PromptLayer
from .model import NPTModel

__all__ = ["NPTConfig", "NPTModel", "PromptLayer"]
