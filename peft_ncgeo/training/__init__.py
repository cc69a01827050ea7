"""Training: arguments, trainer, recipes, and what they are made of."""

from .arguments import GeometryTrainingArguments
from .recipe import Recipe, parse_with_recipe
from .trainer import GeometryTrainer

__all__ = ["GeometryTrainer", "GeometryTrainingArguments", "Recipe", "parse_with_recipe"]
