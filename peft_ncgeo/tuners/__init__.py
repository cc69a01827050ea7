"""PEFT tuners: one folder for each method, with `config.py`, `model.py` and `layer.py`."""
