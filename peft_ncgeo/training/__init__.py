"""Training: arguments, trainer, and what they are made of."""

from .arguments import GeometryTrainingArguments
from .trainer import GeometryTrainer

__all__ = ["GeometryTrainer", "GeometryTrainingArguments"]
