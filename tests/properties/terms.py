"""Every loss with the fields that it reads and the oracle of its value, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from peft_ncgeo import losses
from peft_ncgeo.losses import GeometryBatch

from . import loss_oracles as oracles
from .tensors import FLOATS, dtypes, features, labels, wide

IMAGE, TEXT = ("image_features", "labels"), ("text_features",)
FROZEN = ("frozen_image_features", "frozen_text_features")


@dataclass(frozen=True)
class Term:
    """A loss to try: `fields` are what it reads, `fewest` the classes that its formula asks for."""

    make: Callable[[], Any]
    fields: tuple[str, ...]
    oracle: Callable[[dict[str, Any], Any], float]
    fewest: int = 1
    lowest_label: int = 0
    tolerance: float = 2e-5
    scale: float = 1.0  # by which cosines are multiplied, and with them their rounding


TERMS = {
    "ce": Term(
        losses.CrossEntropy, ("logits", "labels"), lambda b, _: oracles.cross_entropy(b["logits"], b["labels"])
    ),
    "balanced": Term(
        losses.BalancedSoftmax, ("logits", "labels", "class_counts"), lambda b, _: oracles.logit_adjustment(b, 1.0)
    ),
    "adjusted": Term(
        lambda: losses.LogitAdjustment(tau=-2.5),
        ("logits", "labels", "class_counts"),
        lambda b, _: oracles.logit_adjustment(b, -2.5),
    ),
    "ldam": Term(
        lambda: losses.LDAM(max_margin=0.4, scale=3.0),
        ("logits", "labels", "class_counts"),
        lambda b, _: oracles.ldam(b, 0.4, 3.0),
    ),
    "ldam_reweighted": Term(
        lambda: losses.LDAM(reweight_after=0.0, scale=1.0),
        ("logits", "labels", "class_counts", "progress"),
        lambda b, _: oracles.ldam(b, 0.5, 1.0, beta=0.9999),
    ),
    "ot": Term(
        lambda: losses.OTPreservation(weight=1.0),
        (*IMAGE, *TEXT, *FROZEN),
        lambda b, _: oracles.transport(b, "joint"),
    ),
    "ot_separate": Term(
        lambda: losses.OTPreservation(weight=1.0, modality="separate"),
        (*IMAGE, *TEXT, *FROZEN),
        lambda b, _: oracles.transport(b, "separate"),
    ),
    "ot_image": Term(
        lambda: losses.OTPreservation(weight=1.0, modality="image"),
        (*IMAGE, "frozen_image_features"),
        lambda b, _: oracles.transport(b, "image"),
    ),
    "ot_entropic": Term(
        lambda: losses.OTPreservation(weight=1.0, modality="text", solver="entropic", epsilon=0.5),
        ("text_features", "labels", "frozen_text_features"),
        lambda b, _: oracles.transport(b, "text", epsilon=0.5),
        tolerance=1e-3,
    ),
    "pointwise": Term(
        lambda: losses.PointwisePreservation(weight=1.0),
        ("image_features", *TEXT, *FROZEN, "logit_scale"),
        lambda b, _: oracles.pointwise(b, 25.0, 10.0, 1.0, mean=False),
        tolerance=2e-4,
    ),
    "pointwise_mean": Term(
        lambda: losses.PointwisePreservation(weight=1.0, text_weight=0.0, image_weight=-2.0, kl_reduction="mean"),
        ("image_features", *TEXT, *FROZEN, "logit_scale"),
        lambda b, _: oracles.pointwise(b, 0.0, -2.0, 1.0, mean=True),
        tolerance=2e-4,
    ),
    "rotation": Term(
        lambda: losses.RotationStabilization(weight=1.0),
        ("text_features", "frozen_text_features"),
        lambda b, _: oracles.rotation(b),
    ),
    "language": Term(
        lambda: losses.LanguageCollapse(weight=1.0),
        TEXT,
        lambda b, _: oracles.etf_deviation(b["text_features"]),
        fewest=2,
    ),
    "clusters": Term(
        lambda: losses.ClusterCollapse(weight=1.0),
        ("text_features", "frozen_text_features"),
        lambda b, term: oracles.clustered(b, term.clusters.numpy(), "mean"),
    ),
    "clusters_sum": Term(
        lambda: losses.ClusterCollapse(weight=1.0, num_clusters=2, reduction="sum"),
        ("text_features", "frozen_text_features"),
        lambda b, term: oracles.clustered(b, term.clusters.numpy(), "sum"),
        fewest=2,
        tolerance=1e-4,
    ),
    "debiasing": Term(
        lambda: losses.GeometricDebiasing(weight=1.0),
        (*IMAGE, *TEXT),
        lambda b, _: oracles.debiasing(b, anchor=False),
        tolerance=2e-3,
    ),
    "anchored": Term(
        lambda: losses.GeometricDebiasing(weight=1.0, anchor=True),
        (*IMAGE, *TEXT),
        lambda b, _: oracles.debiasing(b, anchor=True),
        tolerance=2e-3,
    ),
    "isomorphism": Term(
        lambda: losses.ModalityIsomorphism(weight=1.0), (*IMAGE, *TEXT), lambda b, _: oracles.isomorphism(b)
    ),
    "sinkhorn": Term(
        lambda: losses.ModalityIsomorphism(weight=1.0, method="sinkhorn", epsilon=0.5),
        (*IMAGE, "template_features"),
        lambda b, _: oracles.isomorphism_sinkhorn(b, 0.5),
        tolerance=2e-3,
    ),
    "alignment": Term(
        lambda: losses.SpaceAlignment(weight=1.0),
        ("class_means", "classifier_weight"),
        lambda b, _: oracles.space_alignment(b, center=True),
        tolerance=2e-3,
    ),
    "alignment_uncentred": Term(
        lambda: losses.SpaceAlignment(weight=1.0, center=False, detach_means=False),
        ("class_means", "classifier_weight"),
        lambda b, _: oracles.space_alignment(b, center=False),
    ),
    "supcon": Term(
        lambda: losses.PrototypeSupCon(copies=2.5, temperature=0.5),
        (*IMAGE, "classifier_weight"),
        lambda b, _: oracles.supcon(b, 2.5, 0.5),
    ),
    "supcon_without": Term(
        lambda: losses.PrototypeSupCon(copies=0, temperature=1e-3),
        (*IMAGE, "classifier_weight"),
        lambda b, _: oracles.supcon(b, 0, 1e-3),
        scale=1e3,
    ),
    "prototype_image": Term(
        losses.PrototypeImageContrast,
        (*IMAGE, "class_means"),
        lambda b, _: oracles.prototype_image(b, losses.PrototypeImageContrast().temperature),
        lowest_label=-1,
    ),
}
names = st.sampled_from(sorted(TERMS))


@st.composite
def batches(draw, term: Term, **like: Any) -> GeometryBatch:
    """A batch that the term can be computed of: what it reads and nothing else. `like`: how features are drawn."""
    n, k, d = draw(st.integers(1, 6)), draw(st.integers(term.fewest, 6)), draw(st.integers(1, 5))
    shapes = {"image": n, "frozen_image": n, "text": k, "frozen_text": k}
    dtype = draw(st.one_of(st.just(None), dtypes))  # one of all fields, or of each its own
    fields: dict[str, Any] = {}
    for field in term.fields:
        if field == "labels":
            fields[field] = draw(labels(n, k))
            if term.lowest_label == -1 and draw(st.booleans()):
                fields[field] = fields[field].long()
                fields[field][draw(st.integers(0, n - 1))] = -1
        elif field == "class_counts":
            counts = draw(st.lists(st.sampled_from([1, 2, 20, 500, 10**6, 10**12]), min_size=k, max_size=k))
            fields[field] = torch.tensor(counts, dtype=draw(st.sampled_from([torch.int64, torch.float64])))
        elif field == "logit_scale":
            fields[field] = torch.tensor(draw(st.floats(-50, 7, width=16)), dtype=draw(st.sampled_from(FLOATS)))
        elif field == "progress":
            fields[field] = draw(st.floats(0, 1))
        elif field == "logits":
            fields[field] = draw(features(n, k, dtype, scales=(1e-3, 1.0, 1e3), **like))
        elif field == "template_features":
            t = draw(st.integers(1, 3))
            fields[field] = draw(features(k * t, d, dtype, **like)).view(k, t, d)
        else:
            fields[field] = draw(features(shapes.get(field.removesuffix("_features"), k), d, dtype, **like))
            if field == "class_means" and draw(st.booleans()):
                fields[field][draw(st.integers(0, k - 1))] = torch.nan
    for field, value in fields.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not field.startswith("frozen"):
            value.requires_grad_(field not in ("logit_scale", "class_counts"))
    return GeometryBatch(**fields)


def in_float64(batch: GeometryBatch) -> dict[str, Any]:
    """Its fields for an oracle."""
    fields = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return {k: v.long().numpy() if k == "labels" else wide(v) for k, v in fields.items()}
