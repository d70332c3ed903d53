"""Adapters on disk."""

from orbit.adapter.files.folder import apart, contents, is_sharded, load, read, save, whole
from orbit.adapter.files.writing import CONFIG, WEIGHTS, packed, replace_files, write_folder

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "apart",
    "contents",
    "is_sharded",
    "load",
    "packed",
    "read",
    "replace_files",
    "save",
    "whole",
    "write_folder",
]
