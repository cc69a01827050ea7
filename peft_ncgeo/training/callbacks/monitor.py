"""Callback that adds the geometry of features to the metrics of an evaluation."""

from __future__ import annotations

from transformers import TrainerCallback

from ...metrics.feature_geometry import FeatureGeometry


class GeometryMonitor(FeatureGeometry, TrainerCallback):
    """Callback that adds the geometry of the features to every evaluation's metrics.

    See [`~peft_ncgeo.metrics.feature_geometry.FeatureGeometry`] for the metrics, arguments and attributes.

    Example: `GeometryTrainer(..., callbacks=[GeometryMonitor()])`
    """
