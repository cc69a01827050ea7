"""Features that the losses of a training step read."""
