"""PEFT tuners: one folder a method, with `config.py`, `model.py`, `layer.py`."""
