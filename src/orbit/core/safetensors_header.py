"""The header of a safetensors file, checked before the library makes tensors of it.

    8 bytes     the header's length N, little-endian
    N bytes     JSON: {"name": {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
    the rest    the tensors' bytes, one after the other

The library sees that the offsets fill the file without gap or overlap. It takes the last of two entries with one name,
where another reader takes the first; and it, like every JSON reader, makes objects of whatever is there, however much.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

MOST_TENSORS = 50_000
_LONGEST = 16 << 20  # bytes of header


def check_header(path: Path) -> None:
    """ValueError naming what is wrong with the header of `path`: too long, repeated names, overlapping tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST):
            raise ValueError(
                f"its header says that it is {length:,} bytes long; the file has {size:,}, and {_LONGEST:,} are read"
            )
        text = file.read(length)
    count = text.count(b'"data_offsets"')
    if count > MOST_TENSORS:
        raise ValueError(f"its header names {count:,} tensors, and at most {MOST_TENSORS:,} are read")
    # An entry has three brackets and few commas; beyond that, only names and metadata have any.
    if text.count(b"[") + text.count(b"{") > 3 * count + 20_000 or text.count(b",") > 16 * count + 100_000:
        raise ValueError("its header has more in it than tensors")
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("its header is no text: it is something else, named .safetensors") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    _check_offsets(header, size - 8 - length)


def _check_offsets(header: dict[str, Any], size: int) -> None:
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise ValueError(f"its header does not say where tensor {name[:80]!r} lies")
        places.append((*offsets, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at or not begin <= end <= size:
            raise ValueError(
                f"tensor {name[:80]!r} lies from byte {begin} to {end}, and byte {at} was to be next: tensors "
                "overlap, or leave gaps"
            )
        at = end
    if at != size:
        raise ValueError(f"its tensors end at byte {at} of {size}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = next(name for name, times in names.items() if times > 1)
        raise ValueError(f"its header has two entries {twice[:80]!r}")
    return found
