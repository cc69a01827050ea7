"""The features that a training step's losses read."""
