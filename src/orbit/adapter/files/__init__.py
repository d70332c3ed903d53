"""Adapters on disk."""

from orbit.adapter.files.folder import is_sharded, load, read, save
from orbit.adapter.files.writing import CONFIG, WEIGHTS

__all__ = ["CONFIG", "WEIGHTS", "is_sharded", "load", "read", "save"]
