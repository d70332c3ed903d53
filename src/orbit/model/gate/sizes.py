"""What every gate asks of its sizes."""

from __future__ import annotations

from orbit.model.errors import SettingError

__all__ = ["check_sizes"]


def check_sizes(**sizes: int) -> None:
    """SettingError that names the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise SettingError(f"{name}={size}: it must be at least 1")
