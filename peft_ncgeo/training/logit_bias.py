"""Bias of the logits of a dual encoder that was trained without a bias, for probabilities of single classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.optimize import brentq
from scipy.special import expit

from ..data.images import ImageCollator, LabelledImages
from ..data.multi_label import multi_hot
from ..geometry.sphere import cosine_logits
from ..models.adapters import adapters_off, unwrap
from ..models.feature_extractor import FeatureExtractor, extract_features
from ..models.image_encoder import image_inputs
from ..models.text_setting import active_logit_bias
from ..models.towers import logit_scale
from .features.text_share import class_features
from .task import ClassificationTask

_IMAGES = 512  # on which it is measured


def choose_logit_bias(
    task: ClassificationTask, extractor: FeatureExtractor, dataset: Dataset, names: Sequence[str]
) -> float | None:
    """Return the bias of a training: the arguments', the adapter's own, or a measured one; None if none is added.

    Args:
        dataset: the training set.
        names: names of its classes.
    """
    base: Any = unwrap(extractor.model)
    if not task.multi_label or not task.reads_text or hasattr(base, "logit_bias"):
        return None
    if task.args.logit_bias is not None:
        return task.args.logit_bias
    known = active_logit_bias(extractor.model)
    return measure_logit_bias(task, extractor, dataset, names) if known is None else known


@torch.no_grad()
def measure_logit_bias(
    task: ClassificationTask, extractor: FeatureExtractor, dataset: Dataset, names: Sequence[str]
) -> float:
    r"""Return the bias b with which the frozen model's mean probability is the share of ones among the labels.

    .. math:: \frac{1}{N K} \sum_{ik} \sigma(e^l \cos(f_i, g_k) + b) = \frac{1}{N K} \sum_{ik} y_{ik}

    The left side is computed on up to 512 images, evenly spaced in the set, with adapters off; so a resumed run and
    each of several processes get the same number. It is rounded to two decimals.
    """
    args, model = task.args, extractor.model
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), _IMAGES)).astype(int).tolist()
    images, collate = LabelledImages(dataset, args.image_column, None), ImageCollator(task.image_processor)
    with adapters_off(extractor):
        texts = class_features(extractor, task.frozen_texts(names)[0], args.device)
        logits = []
        for start in range(0, len(rows), args.eval_batch_size):
            batch = collate([images[i] for i in rows[start : start + args.eval_batch_size]])
            features = extract_features(extractor, **image_inputs(batch, args.device))["image_features"]
            logits.append(cosine_logits(features, texts, logit_scale(model)).cpu().double())
    z, share = torch.cat(logits).numpy(), float(multi_hot(dataset, args.label_column).mean(dtype=np.float64))
    reach = abs(z).max() + 50
    return round(float(brentq(lambda b: expit(z + b).mean() - share, -reach, reach)), 2)
