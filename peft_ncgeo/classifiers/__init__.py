"""Classifiers made of tuned models: by class names, by a few examples, with aligned rows, or exported."""
