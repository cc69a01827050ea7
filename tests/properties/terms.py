"""Every loss with the oracle of its value, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from peft_ncgeo import losses
from peft_ncgeo.losses import GeometryBatch

from ..cases import FORMULAS, IMAGE, Loss
from .loss_oracles import ORACLES
from .tensors import FLOATS, KINDS, dtypes, features, labels, wide


@dataclass(frozen=True)
class Term:
    """A loss to try: its value by other code, and what its formula asks for."""

    loss: Loss
    oracle: Callable[..., float]  # of the batch's fields, the loss and its arguments
    fewest: int = 1  # classes
    lowest_label: int = 0
    tolerance: float = 2e-5
    scale: float = 1.0  # by which cosines are multiplied, and with them their rounding
    kinds: tuple[str, ...] = KINDS  # of features

    @property
    def fields(self) -> tuple[str, ...]:
        return self.loss.reads

    def make(self) -> Any:
        return self.loss()

    def value(self, batch: GeometryBatch, loss: Any) -> float:
        """Return the value that the loss should have, in float64."""
        return self.oracle(in_float64(batch), loss, **self.loss.arguments)


# How far float32 and features of half precision may be from it; iterations and differences of large parts lose digits.
WIDER: dict[str, dict[str, Any]] = {
    "OTPreservation(joint, epsilon 0.5)": {"tolerance": 1e-3},
    "PointwisePreservation(published)": {"tolerance": 2e-4},
    "PointwisePreservation(mean)": {"tolerance": 2e-4},
    "LanguageCollapse()": {"fewest": 2},
    "ClusterCollapse(2 clusters, sum)": {"fewest": 2, "tolerance": 1e-4},
    "GeometricDebiasing(anchor False)": {"tolerance": 2e-3},
    "GeometricDebiasing(anchor True)": {"tolerance": 2e-3},
    "ModalityIsomorphism(sinkhorn, epsilon 0.5)": {"tolerance": 2e-3},
    "SpaceAlignment(detach True, center True)": {"tolerance": 2e-3},
    "PrototypeImageContrast(default)": {"lowest_label": -1},
}
TERMS = {name: Term(loss, ORACLES[loss.cls], **WIDER.get(name, {})) for name, loss in FORMULAS.items()}
# cosines over a temperature of 0.001, with no copy of a prototype among them
SHARP = Loss(losses.PrototypeSupCon, {"copies": 0, "temperature": 1e-3}, (*IMAGE, "classifier_weight"))
TERMS["PrototypeSupCon(no copies, temperature 0.001)"] = Term(SHARP, ORACLES[SHARP.cls], scale=1e3)
names = st.sampled_from(sorted(TERMS))


@st.composite
def batches(draw, term: Term, **like: Any) -> GeometryBatch:
    """A batch that the term can be computed of: what it reads and nothing else. `like`: how features are drawn."""
    like = {"kinds": term.kinds, **like}
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
        elif field == "multi_hot":
            rows = draw(st.lists(st.lists(st.integers(0, 1), min_size=k, max_size=k), min_size=n, max_size=n))
            fields[field] = torch.tensor(rows, dtype=draw(st.sampled_from(FLOATS)))
        elif field == "class_counts":
            counts = draw(st.lists(st.sampled_from([1, 2, 20, 500, 10**6, 10**12]), min_size=k, max_size=k))
            fields[field] = torch.tensor(counts, dtype=draw(st.sampled_from([torch.int64, torch.float64])))
        elif field == "logit_scale":
            fields[field] = torch.tensor(draw(st.floats(-50, 7, width=16)), dtype=draw(st.sampled_from(FLOATS)))
        elif field == "progress":
            fields[field] = draw(st.floats(0, 1))
        elif field in ("logits", "teacher_logits"):
            fields[field] = draw(features(n, k, dtype, scales=(1e-3, 1.0, 1e3), **like))
        elif field == "template_features":
            t = draw(st.integers(1, 3))
            fields[field] = draw(features(k * t, d, dtype, **like)).view(k, t, d)
        else:
            fields[field] = draw(features(shapes.get(field.removesuffix("_features"), k), d, dtype, **like))
            if field == "class_means" and draw(st.booleans()):
                fields[field][draw(st.integers(0, k - 1))] = torch.nan
    for field, value in fields.items():
        if (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and not field.startswith(("frozen", "teacher"))
        ):
            value.requires_grad_(field not in ("logit_scale", "class_counts", "multi_hot"))
    return GeometryBatch(**fields)


def in_float64(batch: GeometryBatch) -> dict[str, Any]:
    """Its fields for an oracle."""
    fields = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    found = {k: v.long().numpy() if k == "labels" else wide(v) for k, v in fields.items()}
    return found if batch.progress is None else {**found, "progress": batch.progress}
