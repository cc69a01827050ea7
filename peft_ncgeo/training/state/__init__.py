"""State that lasts from one pass to the next, in memory and in checkpoints."""
