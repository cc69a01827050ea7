"""A tower of a family that nobody has written, and checks of the loss and the family that CONTRIBUTING.md adds."""
