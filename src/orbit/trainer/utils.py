"""The helpers of document 003 under their documented path."""

from orbit.core.nested import key_average, map_nested_tensor

__all__ = ["key_average", "map_nested_tensor"]
