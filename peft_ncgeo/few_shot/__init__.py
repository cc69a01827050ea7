"""Adaptation to a few labelled images."""
