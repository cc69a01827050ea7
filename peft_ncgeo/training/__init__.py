"""Training: arguments, trainer, recipes and their parts."""

from ..classifiers.aligned import AlignedClassifier, align_classifier
from ..classifiers.alignment_sweep import sweep_alignment
from ..classifiers.interpolation import Interpolation, interpolate, sweep_interpolation
from ..classifiers.sweep import Sweep
from ..few_shot.adapt import adapt
from ..few_shot.episodes import fit_episodes, fit_heads
from ..hub.few_shot_record import record_few_shot
from ..hub.record import TrainingRecord
from .arguments import GeometryTrainingArguments
from .callbacks.alignment import GradientProjection, SlerpAlignment
from .callbacks.averaging import PromptAveraging
from .callbacks.monitor import GeometryMonitor
from .recipe import Recipe, parse_with_recipe
from .stages import train_stages
from .trainer import GeometryTrainer

__all__ = [
    "AlignedClassifier",
    "GeometryMonitor",
    "GeometryTrainer",
    "GeometryTrainingArguments",
    "GradientProjection",
    "Interpolation",
    "PromptAveraging",
    "Recipe",
    "SlerpAlignment",
    "Sweep",
    "TrainingRecord",
    "adapt",
    "align_classifier",
    "fit_episodes",
    "fit_heads",
    "interpolate",
    "parse_with_recipe",
    "record_few_shot",
    "sweep_alignment",
    "sweep_interpolation",
    "train_stages",
]
