"""What a checkpoint file would do when loaded, found out without letting it.

`torch.load(weights_only=True)` makes nothing but tensors and plain values, but it trusts the file in how large they
are: a storage that says it has more numbers than the file holds is read beyond its end, a pickle of a few bytes may
ask for gigabytes, and one of many megabytes keeps it busy for minutes. So, before it is called:

    archive     is it laid out as `torch.save` does it (`archive.py`)?
    opcodes     only those of `torch.save`; only known names; a bounded number of them
    dry run     the pickle is run with blanks for all that it names: every storage must be a record of just its size,
                every tensor must lie in its storage, and the nesting must be shallow

The three are linear in the number of tensors, and the tensors' bytes are not read.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from orbit.core.checkpoint.archive import Malformed, Record, records
from orbit.core.checkpoint.errors import CheckpointError

_MOST_OPCODES = 1_500_000  # 50,000 tensors have as many
_MOST_PARTS = 500_000  # keys and values, a tensor counting as one
_DEEPEST = 64
_MOST_EXPANDED = 64 << 20  # bytes that tensors may have beyond their storages (stride 0), all together
_LEAVES = {
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
}
_NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE")
_TAKEN: dict[str, int | None] = {  # values that an opcode takes off the stack; None is all since the mark
    **{"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "BINPERSID": 1, "BUILD": 1},
    **{"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None},
}
_NAMES = {
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("_codecs", "encode"),
    ("__builtin__", "set"),
    ("__builtin__", "complex"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.storage", "UntypedStorage"),
    ("torch._tensor", "_rebuild_from_type_v2"),  # of a subclass, which must be known
    *(
        ("torch._utils", f"_rebuild_{what}")
        for what in ("tensor_v2", "tensor_v3", "parameter", "wrapper_subclass")
    ),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
# What a pickle that is no pickle makes the reader raise; Malformed is a ValueError.
_ERRORS = (
    *(pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError, EOFError, OverflowError),
    RecursionError,
)


def screen(path: Path) -> None:
    """CheckpointError if `path` is anything else than what `save_checkpoint` or `torch.save` writes of a state."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = records(content)
            at = found["data.pkl"]
            text = content[at.start : at.start + at.size]
        _check_opcodes(text)
        _check_tree(_DryRun(text, found).load())
    except _ERRORS as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {error}. Nothing of it was loaded; take a checkpoint that this "
            "library or torch.save wrote"
        ) from None


def _check_opcodes(text: bytes) -> None:
    """Only those of `torch.save`, not too many, and no tuple nested too deeply: to hash one takes the C stack.

    `depths` is the reader's stack, holding of every value how deeply tuples and calls are nested in it.
    """
    depths: list[int] = []
    marks: list[int] = []
    memo: list[int] = []
    for number, (opcode, argument, _) in enumerate(pickletools.genops(text)):
        name: str = opcode.name
        at: Any = argument
        if name in _LEAVES:
            depths.append(0)
        elif name == "BINPUT" or name == "LONG_BINPUT":
            if at > len(memo):  # the reader makes room for as many
                raise Malformed(f"its pickle stores in place {at} when {len(memo)} are taken")
            memo[at : at + 1] = depths[-1:]
        elif name == "BINGET" or name == "LONG_BINGET":
            depths.append(memo[at])
        elif name == "GLOBAL":
            _check_name(*at.split(" ", 1))
            depths.append(0)
        elif name == "MARK":
            marks.append(len(depths))
        elif name in _TAKEN:
            count = _TAKEN[name]
            first = marks.pop() if count is None else len(depths) - count
            taken = depths[first:]
            del depths[first:]
            if name in _NESTING:
                depths.append(1 + max(taken, default=0))
                if depths[-1] > _DEEPEST:
                    raise Malformed(f"it is nested over {_DEEPEST} deep")
            elif name == "BINPERSID":
                depths.append(0)
        elif name not in ("PROTO", "STOP"):
            raise Malformed(f"its pickle has an opcode {name}, which torch.save does not write")
        if number > _MOST_OPCODES:
            raise Malformed(f"its pickle has over {_MOST_OPCODES:,} opcodes")


def _check_name(module: str, name: str) -> None:
    if (module, name) not in _NAMES and _dtype(module, name) is None and f"{module}.{name}" not in _users():
        raise Malformed(
            f"its pickle names {module}.{name}, and a checkpoint holds dense tensors and plain values only (a tensor "
            "class of your own is made known by torch.serialization.add_safe_globals)"
        )


def _users() -> set[str]:
    """What the user, or a package that he imported, has told PyTorch to be safe."""
    entries = torch.serialization.get_safe_globals()
    return {str(e[1]) if isinstance(e, tuple) else f"{e.__module__}.{e.__qualname__}" for e in entries}


@lru_cache(maxsize=256)
def _dtype(module: str, name: str) -> torch.dtype | None:
    """The dtype that `torch.float32` or `torch.FloatStorage` names."""
    found = getattr(torch, _STORAGES.get(name, name), None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


class _DryRun(pickle.Unpickler):
    """Runs a pickle in which every name is a blank, and checks what it says about storages and tensors."""

    def __init__(self, text: bytes, found: Mapping[str, Record]) -> None:
        super().__init__(io.BytesIO(text))
        self.found = found
        self.expanded = 0

    def find_class(self, module: str, name: str) -> Any:
        _check_name(module, name)
        return _Blank(self, module, name)

    def persistent_load(self, reference: Any) -> Any:
        kind, storage, key, place, count = reference
        if kind != "storage" or not isinstance(storage, _Blank) or not isinstance(place, str):
            raise Malformed(f"its pickle refers to a {kind!r}")
        record = self.found.get(f"data/{key}")
        size = whole(count, "a storage's size") * storage.itemsize
        if record is None or record.size != size:
            raise Malformed(
                f"its pickle says that storage {key!r} has {size:,} bytes, and the file has "
                f"{'none' if record is None else f'{record.size:,}'}"
            )
        return _Storage(size, storage.itemsize)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, itemsize: int) -> None:
        if (
            not isinstance(storage, _Storage)
            or not isinstance(shape, tuple)
            or not isinstance(strides, tuple)
        ):
            raise Malformed("its pickle makes a tensor of something else than a storage, a shape and strides")
        sizes = [whole(n, "a tensor's size") for n in shape]
        steps = [whole(n, "a tensor's stride") for n in strides]
        if len(sizes) != len(steps) or len(sizes) > _DEEPEST:
            raise Malformed(f"its pickle has a tensor with {len(sizes)} sizes and {len(steps)} strides")
        if 0 in sizes:
            return
        last = whole(offset, "a tensor's offset") + sum(
            (n - 1) * s for n, s in zip(sizes, steps, strict=True)
        )
        if (last + 1) * itemsize > storage.size:
            raise Malformed(
                f"its pickle has a tensor of shape {tuple(sizes)} that ends at byte {(last + 1) * itemsize:,} of a "
                f"storage of {storage.size:,}"
            )
        self.expanded += max(0, math.prod(sizes) * itemsize - storage.size)
        if self.expanded > _MOST_EXPANDED:
            raise Malformed(
                f"its pickle has a tensor of shape {tuple(sizes)}, and {storage.size:,} bytes for it"
            )


class _Storage:
    __slots__ = ("itemsize", "size")

    def __init__(self, size: int, itemsize: int) -> None:
        self.size, self.itemsize = size, itemsize


class _Blank:
    """Stands for a class or function that the pickle names, and for what it would make. Does nothing."""

    __slots__ = ("run", "what")

    def __init__(self, run: _DryRun, module: str, name: str) -> None:
        self.run, self.what = run, (module, name)

    @property
    def itemsize(self) -> int:
        if self.what == ("torch.storage", "UntypedStorage"):
            return 1
        dtype = _dtype(*self.what)
        if dtype is None:
            raise Malformed(f"its pickle takes {'.'.join(self.what)} for a kind of number")
        return dtype.itemsize

    def __call__(self, *arguments: Any) -> Any:
        module, name = self.what
        if module == "collections":
            return OrderedDict(*arguments)
        if name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            storage, offset, shape, strides = arguments[:4]
            numbers = arguments[6] if name.endswith("3") else storage
            self.run.tensor(storage, offset, shape, strides, getattr(numbers, "itemsize", 1))
            return None
        elif name == "_rebuild_from_type_v2" and isinstance(arguments[0], _Blank):
            return arguments[0](*arguments[2]), arguments[3:]
        return arguments  # whatever is in them is looked at with the rest

    def __setstate__(self, state: Any) -> None:
        raise Malformed(f"its pickle changes {'.'.join(self.what)}")


def _check_tree(top: Any) -> None:
    """Not nested too deeply, and not of too many parts when what is named twice is counted twice."""
    count, left = 0, [(top, 0)]
    while left:
        value, depth = left.pop()
        count += 1
        if depth > _DEEPEST:
            raise Malformed(f"it is nested over {_DEEPEST} deep")
        if count > _MOST_PARTS:
            raise Malformed(f"it has over {_MOST_PARTS:,} parts: many numbers belong into a tensor")
        if isinstance(value, dict):
            left += [(part, depth + 1) for part in dict.keys(value)]
            left += [(part, depth + 1) for part in dict.values(value)]
        elif isinstance(value, (list, tuple, set)):
            left += [(part, depth + 1) for part in value]


def whole(number: Any, what: str) -> int:
    """A whole number from 0 to 2**63-1. Malformed if it is none."""
    if type(number) is not int or not 0 <= number < 2**63:
        raise Malformed(f"{what} is {str(number)[:40]}")
    return number
