"""Metrics of predictions and features: pure functions, and modules for the `evaluate` library."""
