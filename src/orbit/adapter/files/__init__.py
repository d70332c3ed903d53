"""Adapters on disk."""

from orbit.adapter.files.folder import CONFIG, WEIGHTS, is_sharded, load, read, save

__all__ = ["CONFIG", "WEIGHTS", "is_sharded", "load", "read", "save"]
