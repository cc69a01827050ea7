"""Adapters in files and on the Hub."""

from .load import load_adapter
from .published import ImportedPrompts, import_prompts

__all__ = ["ImportedPrompts", "import_prompts", "load_adapter"]
