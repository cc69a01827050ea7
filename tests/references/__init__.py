"""What every loss, geometry function and preset gave for one input, kept in a file, so that a change is noticed."""
