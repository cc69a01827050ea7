"""Data sets: class prompts, base/new and few-shot splits, long tails, episodes, and built-in images."""

from .class_prompts import class_prompts
from .classes import rename_classes, select_classes
from .demo import load_demo
from .domains import FewShotDomain, load_few_shot_domains
from .episodes import Episode, EpisodeSampler
from .image_sets import load_images
from .long_tails import class_counts, long_tailed, realised_imbalance_factor, step_imbalanced
from .mixing import CutMix, MixUp
from .photographs import load_image_demo
from .sources import DatasetSource
from .splits import base_new_split, few_shot, split_validation

__all__ = [
    "CutMix",
    "DatasetSource",
    "Episode",
    "EpisodeSampler",
    "FewShotDomain",
    "MixUp",
    "base_new_split",
    "class_counts",
    "class_prompts",
    "few_shot",
    "load_demo",
    "load_few_shot_domains",
    "load_image_demo",
    "load_images",
    "long_tailed",
    "realised_imbalance_factor",
    "rename_classes",
    "select_classes",
    "split_validation",
    "step_imbalanced",
]
