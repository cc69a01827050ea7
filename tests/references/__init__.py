"""Stored values of every loss, geometry function and preset for one input, so that a change is noticed."""
