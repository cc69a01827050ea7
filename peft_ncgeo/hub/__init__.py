"""Adapters in files and on the Hub."""

from .load import load_adapter

__all__ = ["load_adapter"]
