"""Adapters from files and from the Hub, and prompts that other projects' code has written."""
