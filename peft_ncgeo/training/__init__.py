"""Training: arguments, trainer, recipes, and what they are made of."""

from .arguments import GeometryTrainingArguments
from .callbacks import GeometryMonitor, PromptAveraging
from .recipe import Recipe, parse_with_recipe
from .trainer import GeometryTrainer

__all__ = [
    "GeometryMonitor",
    "GeometryTrainer",
    "GeometryTrainingArguments",
    "PromptAveraging",
    "Recipe",
    "parse_with_recipe",
]
