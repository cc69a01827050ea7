"""PEFT tuners: one folder for each method, with `config.py`, `model.py`, `layer.py`."""
