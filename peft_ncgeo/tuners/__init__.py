"""PEFT tuners: one folder for each method, with `config.py`, `model.py` and `layer.py`."""

from .prompt_config import PromptConfig

__all__ = ["PromptConfig"]
