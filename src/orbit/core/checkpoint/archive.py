"""The layout of a file that `torch.save` wrote, read strictly and before anything is made of its content.

    local header · bytes · descriptor      one record after the other, without a gap or an overlap
    …
    directory · end of directory           names, sizes and places of the records; the file ends here

    <top>/data.pkl                         the pickle; only `core/checkpoint/screening.py` looks into it
    <top>/data/<n>                         the bytes of storage n
    <top>/byteorder, version, …            a few bytes each

Nothing is compressed, so nothing can grow; the places add up to the file's size, so another reader of the same file
finds the same records. Only headers are read: the rest of the file stays where it is. (.ZIP File Format Specification
6.3; PyTorch writes with miniz.)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple

MOST_RECORDS = 50_000  # PyTorch itself takes 6 seconds to read as many
LARGEST_PICKLE = 32 << 20  # bytes
_LARGEST_NOTE = 1024  # bytes of byteorder, version, …
_NAME = re.compile(
    r"(?P<top>[^/\\]+)/(?:(?P<own>data\.pkl|data/[0-9]{1,9})|[a-z_]{1,40}|\.[a-z_]{1,40}(?:/[a-z_]{1,40})?)"
)
_END, _END64, _LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_STREAMED, _UTF8 = 0x0008, 0x0800  # sizes stand behind the bytes; the name is UTF-8
_DESCRIPTORS = {False: (0,), True: (16, 24)}  # bytes that they take


class Malformed(ValueError):
    """This is no file that `torch.save` writes; the message says where it differs."""


class Record(NamedTuple):
    """Where the bytes of a record lie in the file."""

    start: int
    size: int


def records(file: mmap) -> dict[str, Record]:
    """The records by their names below the top folder: "data.pkl", "data/0", …

    Raises:
        Malformed: anything else than what `torch.save` writes.
    """
    count, start, end = _directory(file)
    if count > MOST_RECORDS:
        raise Malformed(f"it has {count} records, and at most {MOST_RECORDS} are read")
    found: dict[str, Record] = {}
    tops: set[str] = set()
    at, streamed = 0, False  # where the last record's bytes ended, and whether its sizes stand there
    for name, flags, size, place in _entries(file, count, start, end):
        match = _NAME.fullmatch(name)
        if match is None or match["top"] in (".", ".."):
            raise Malformed(f"it has a record {name[:80]!r}, which torch.save does not write")
        below = name[len(match["top"]) + 1 :]
        if below in found:
            raise Malformed(f"it has two records {name!r}")
        if match["own"] is None and size > _LARGEST_NOTE:
            raise Malformed(f"its record {name!r} has {size} bytes")
        if place - at not in _DESCRIPTORS[streamed]:
            raise Malformed(f"its record {name!r} begins at byte {place}, where byte {at} was expected")
        streamed = bool(flags & _STREAMED)
        found[below] = Record(_content(file, name, place), size)
        at = found[below].start + size
        tops.add(match["top"])
        if flags & ~(_STREAMED | _UTF8):
            raise Malformed(f"its record {name!r} has flags {flags:#x}: it is encrypted or otherwise encoded")
    if len(tops) != 1 or "data.pkl" not in found:
        raise Malformed("it holds no data.pkl")
    if start - at not in _DESCRIPTORS[streamed]:
        raise Malformed(f"its records end at byte {at} and its directory begins at byte {start}")
    if found["data.pkl"].size > LARGEST_PICKLE:
        raise Malformed(
            f"its pickle has {found['data.pkl'].size:,} bytes, and at most {LARGEST_PICKLE:,} are read"
        )
    return found


def _directory(file: mmap) -> tuple[int, int, int]:
    """(number of records, where the directory begins, where it ends)."""
    last = len(file) - 22
    if last < 0 or file[last : last + 4] != _END:
        raise Malformed("it does not end as a zip file of torch.save does: it is something else, or cut off")
    disk, first, here, count, size, start, comment = struct.unpack_from("<HHHHIIH", file, last + 4)
    end = last
    if file[max(0, last - 20) : max(0, last - 20) + 4] == _LOCATOR:
        end = last - 20 - 56
        if end < 0 or file[end : end + 4] != _END64:
            raise Malformed("its directory's end is not where it must be")
        disk, first, here, count, size, start = struct.unpack_from("<IIQQQQ", file, end + 16)
    if disk or first or comment or here != count or start + size != end:
        raise Malformed("its directory does not end where the file does")
    return count, start, end


def _entries(file: mmap, count: int, at: int, end: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, flags, size, place of the local header) of every record in the directory."""
    for _ in range(count):
        if at + 46 > end or file[at : at + 4] != b"PK\1\2":
            raise Malformed("its directory is damaged")
        flags, method = struct.unpack_from("<HH", file, at + 8)
        packed, size, length, extra, comment = struct.unpack_from("<IIHHH", file, at + 20)
        (place,) = struct.unpack_from("<I", file, at + 42)
        name = file[at + 46 : at + 46 + length].decode("utf-8", "replace")
        wide = file[at + 46 + length : at + 46 + length + extra]
        at += 46 + length + extra + comment
        if at > end or comment:
            raise Malformed("its directory is damaged")
        if 0xFFFFFFFF in (packed, size, place):
            size, packed, place = _wide(wide, size, packed, place)
        if method or packed != size:
            raise Malformed(f"its record {name[:80]!r} is compressed: torch.save never does that")
        yield name, flags, size, place
    if at != end:
        raise Malformed("its directory is longer than what it lists")


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """Values over 4 GiB, from the directory's zip64 field."""
    if len(extra) < 4 or struct.unpack_from("<H", extra)[0] != 1:
        raise Malformed("its directory is damaged")
    numbers = iter(struct.unpack_from(f"<{(len(extra) - 4) // 8}Q", extra, 4))
    try:
        return tuple(next(numbers) if value == 0xFFFFFFFF else value for value in values)
    except StopIteration:
        raise Malformed("its directory is damaged") from None


def _content(file: mmap, name: str, place: int) -> int:
    """Where a record's bytes begin, behind its local header, which must be of this name."""
    if place + 30 > len(file) or file[place : place + 4] != b"PK\3\4":
        raise Malformed(f"there is no record {name!r} at byte {place}, where its directory says so")
    method, length, extra = struct.unpack_from("<H16xHH", file, place + 8)
    if method or file[place + 30 : place + 30 + length].decode("utf-8", "replace") != name:
        raise Malformed(f"the record at byte {place} is another than {name!r}")
    return place + 30 + length + extra
