"""Adapters in files and on the Hub."""

from ..loading.converted import ImportedPrompts, import_prompts
from ..loading.hypothesis_template import hypothesis_template
from ..loading.load import fetch_adapter, load_adapter
from .card import create_card
from .export import export_classifier
from .push import check_push, push_adapter
from .save import draw_geometry, save_adapter
from .space import write_space

__all__ = [
    "ImportedPrompts",
    "check_push",
    "create_card",
    "draw_geometry",
    "export_classifier",
    "fetch_adapter",
    "hypothesis_template",
    "import_prompts",
    "load_adapter",
    "push_adapter",
    "save_adapter",
    "write_space",
]
