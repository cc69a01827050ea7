"""Survey of what works on which model: each capability on a tiny random model of each class (`make models`)."""
