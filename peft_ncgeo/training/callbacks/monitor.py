"""A callback that adds the geometry of features to an evaluation's metrics."""

from __future__ import annotations

from transformers import TrainerCallback

from ...metrics.feature_geometry import FeatureGeometry


class GeometryMonitor(FeatureGeometry, TrainerCallback):
    """Callback that adds the geometry of the features to every evaluation's metrics.

    See [`~peft_ncgeo.metrics.feature_geometry.FeatureGeometry`] for the metrics, arguments and attributes.

    Example: `GeometryTrainer(..., callbacks=[GeometryMonitor()])`
    """
