"""Evaluation protocols: every recipe in every setting from every seed, as a table that can be resumed."""

from .all_classes import all_classes
from .base_to_new import base_to_new
from .episode_results import EpisodeResults
from .few_shot import FewShotMethod, few_shot
from .long_tail import long_tail
from .results import Results
from .runs import Task, run_cells
from .transfer import cross_dataset, domain_generalisation

__all__ = [
    "EpisodeResults",
    "FewShotMethod",
    "Results",
    "Task",
    "all_classes",
    "base_to_new",
    "cross_dataset",
    "domain_generalisation",
    "few_shot",
    "long_tail",
    "run_cells",
]
