"""Models: their towers, heads and adapters, and how images and texts become features."""
