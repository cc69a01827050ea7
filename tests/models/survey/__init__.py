"""What works on which model: every capability on a tiny random model of every class. `make models` runs it."""
