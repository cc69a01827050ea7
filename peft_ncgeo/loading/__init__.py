"""Adapters from files and from the Hub, and prompts converted from other projects' checkpoints."""
