"""CPT (arXiv 2605.11939): collapse within clusters and rotation stabilisation, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ncgeo.losses import (
    ClusterCollapse,
    GeometryBatch,
    LanguageCollapse,
    OTPreservation,
    RotationStabilization,
)

from ..losses.batches import random_batch, unit_rows
from ..training.runs import trainer, weights


def grouped_batch() -> GeometryBatch:
    """Frozen texts in three plain groups of sizes 3, 2 and 1."""
    centres = 20 * torch.eye(6, dtype=torch.float64)[[0, 0, 0, 3, 3, 5]]
    batch = random_batch(classes=6)
    batch.frozen_text_features = centres + batch.frozen_text_features
    return batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_by_hand(reduction):
    batch = grouped_batch()
    g = unit_rows(batch.text_features.detach().numpy())
    sums = {}
    for members in ((0, 1, 2), (3, 4)):
        k = len(members)
        sums[k] = sum((g[i] @ g[j] + 1 / (k - 1)) ** 2 for i in members for j in members if i != j)
    expected = sum(sums.values()) / 3 if reduction == "sum" else np.mean([s / (k * (k - 1)) for k, s in sums.items()])
    term = ClusterCollapse(weight=0.25, num_clusters=3, reduction=reduction)
    assert term(batch).item() == pytest.approx(expected, rel=1e-12)
    assert term.clusters.tolist() == [0, 0, 0, 1, 1, 2]


def test_the_printed_formula_differs_by_a_constant():
    """As printed, with the diagonal kept, where the target is k/(k-1)(I - 11^T/k): no more than a constant more."""
    batch = grouped_batch()
    batch.frozen_text_features = batch.frozen_text_features[:1] + random_batch(classes=6).frozen_text_features * 1e-3
    other = grouped_batch()
    other.frozen_text_features = batch.frozen_text_features
    other.text_features = random_batch(classes=6, seed=5).text_features
    gaps = []
    for b in (batch, other):
        g = unit_rows(b.text_features.detach().numpy())
        k = 6
        printed = np.linalg.norm(g @ g.T + 1 / (k - 1)) ** 2
        gaps.append(printed - ClusterCollapse(weight=1.0, num_clusters=1, reduction="sum")(b).item())
    assert gaps[0] == pytest.approx(6**3 / 5**2, rel=1e-12)
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-12)


def test_one_cluster_equals_language_collapse():
    batch = random_batch()
    assert ClusterCollapse(weight=1.0)(batch).item() == pytest.approx(
        LanguageCollapse(weight=1.0)(batch).item(), rel=1e-12
    )


def test_default_number_of_clusters():
    generator = torch.Generator().manual_seed(0)
    for classes, clusters in ((16, 1), (17, 2), (40, 3)):
        frozen = torch.randn(classes, 64, generator=generator)
        term = ClusterCollapse(weight=1.0)
        term(GeometryBatch(text_features=frozen, frozen_text_features=frozen))
        assert term.clusters.max() + 1 == clusters


def test_a_cluster_too_large_for_the_width_warns():
    batch = random_batch(classes=8, dim=3)
    with pytest.warns(UserWarning, match="8 classes.*3.*cannot.*ETF"):
        ClusterCollapse(weight=1.0)(batch)


def test_clusters_come_from_the_frozen_texts_once():
    batch, term = grouped_batch(), ClusterCollapse(weight=1.0, num_clusters=3)
    term(batch)
    first = term.clusters.clone()
    batch.frozen_text_features = random_batch(classes=6, seed=9).frozen_text_features
    batch.text_features = random_batch(classes=6, seed=8).text_features
    term(batch)
    assert torch.equal(term.clusters, first)
    again = ClusterCollapse(weight=1.0, num_clusters=3)
    again.load_state_dict(term.state_dict())
    assert again(batch).item() == term(batch).item()
    with pytest.raises(ValueError, match="clusters.*6 classes.*5"):
        term(random_batch())


def test_singletons_only_give_zero():
    batch = random_batch()
    value = ClusterCollapse(weight=1.0, num_clusters=5)(batch)
    assert value.item() == 0
    value.backward()


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="num_clusters=0"):
        ClusterCollapse(weight=1.0, num_clusters=0)
    with pytest.raises(ValueError, match="reduction='max'"):
        ClusterCollapse(weight=1.0, reduction="max")
    with pytest.raises(ValueError, match="num_clusters=6 must.*least 1.*most 5"):
        ClusterCollapse(weight=1.0, num_clusters=6)(random_batch())


def test_rotation_stabilization_by_hand():
    batch = random_batch()
    g, g0 = (unit_rows(getattr(batch, f).detach().numpy()) for f in ("text_features", "frozen_text_features"))
    expected = np.mean([np.abs(a - b).sum() for a, b in zip(g, g0, strict=True)])
    assert RotationStabilization(weight=0.1)(batch).item() == pytest.approx(expected, rel=1e-12)


def test_resumed_equals_uninterrupted(tmp_path):
    """Clusters, a memory of pairs and a multiplier come back from the checkpoint."""

    def losses():
        return [
            ClusterCollapse(weight=0.5, num_clusters=2),
            RotationStabilization(budget=0.01),
            OTPreservation(weight=1.0, memory_size=12),
        ]

    whole = trainer(tmp_path, losses=losses(), save_strategy="steps", save_steps=5)
    whole.train()
    resumed = trainer(tmp_path / "again", losses=losses())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name
    assert torch.equal(whole.losses[0].clusters, resumed.losses[0].clusters)
