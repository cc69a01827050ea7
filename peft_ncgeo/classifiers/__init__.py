"""Tuned models as classifiers: by class names, by a few examples, with aligned rows, or exported."""
