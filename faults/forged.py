"""Files that somebody made to do harm when they are loaded. Each function writes one and returns its path.

`CHECKPOINTS` are to be refused by `load_checkpoint`, `ADAPTERS` (safetensors beside an `adapter_config.json`) by
`orbit.adapter.files`. The texts are parts of the message that must refuse them. A file that runs code would make
`canary`, a file in the same folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orbit.core import checkpoint

CANARY = "canary"
_NOTES = {"byteorder": b"little", "version": b"3\n"}


class _Touch:
    """Makes the canary when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.folder / CANARY}",)


def archive(path: Path, entries: list[tuple[str, bytes]], method: int = 0) -> Path:
    """A zip file of these records, one after the other, stored; quicker than `zipfile` for many of them."""
    body, directory = io.BytesIO(), io.BytesIO()
    for name, content in entries:
        place, raw, label = body.tell(), zlib.crc32(content), name.encode()
        packed = content if method == 0 else zlib.compress(content)[2:-4]
        sizes = struct.pack("<III", raw, len(packed), len(content))
        body.write(b"PK\3\4" + struct.pack("<HHHHH", 20, 0x800, method, 0, 0) + sizes)
        body.write(struct.pack("<HH", len(label), 0) + label + packed)
        directory.write(b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, 0x800, method, 0, 0) + sizes)
        directory.write(struct.pack("<HHHHHII", len(label), 0, 0, 0, 0, 0, place) + label)
    start, size, count = body.tell(), directory.tell(), len(entries)
    path.write_bytes(
        body.getvalue()
        + directory.getvalue()
        + (b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start))
        + (b"PK\6\7" + struct.pack("<IQI", 0, start + size, 1))
        + (b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, min(count, 65535), min(count, 65535), size, start, 0))
    )
    return path


def _pickled(folder: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    entries = [("data.pkl", pickled), *_NOTES.items()]
    entries += [(f"data/{key}", content) for key, content in (storages or {}).items()]
    return archive(folder / "forged.pt", [(f"x/{name}", content) for name, content in entries])


def _storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """The opcodes that push a storage."""
    number = b"\x8a" + bytes([9]) + numel.to_bytes(9, "little")
    return b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text("cpu") + number + b"tQ"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _tensor(storage: bytes, size: int, stride: int, offset: int = 0) -> bytes:
    def number(n: int) -> bytes:
        return b"\x8a" + bytes([9]) + n.to_bytes(9, "little")

    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + number(size) + b"\x85"
        + number(stride) + b"\x85" + b"\x89" + b"ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def _holding(value: bytes) -> bytes:
    return b"\x80\x02}" + _text("w") + value + b"s."


# -- checkpoints ---------------------------------------------------------------------------------------------------


def reduce_pickle(folder: Path) -> Path:
    return _pickled(folder, pickle.dumps({"w": _Touch(folder)}, protocol=2))


def bare_pickle(folder: Path) -> Path:
    path = folder / "forged.pt"
    path.write_bytes(pickle.dumps({"w": _Touch(folder)}, protocol=2))
    return path


def eval_by_name(folder: Path) -> Path:
    call = b"cbuiltins\neval\n" + _text(f"open({str(folder / CANARY)!r}, 'w')") + b"\x85R"
    return _pickled(folder, _holding(call))


def deflated_bomb(folder: Path) -> Path:
    return archive(
        folder / "forged.pt", [("x/data.pkl", _holding(b"N")), ("x/data/0", bytes(200 << 20))], method=8
    )


def huge_storage(folder: Path) -> Path:
    return _pickled(folder, _holding(_tensor(_storage(10**12), 10**12, 1)), {"0": bytes(16)})


def huge_tensor(folder: Path) -> Path:
    return _pickled(folder, _holding(_tensor(_storage(4), 10**12, 1)), {"0": bytes(16)})


def expanded_tensor(folder: Path) -> Path:
    return _pickled(folder, _holding(_tensor(_storage(4), 10**12, 0)), {"0": bytes(16)})


def beyond_its_storage(folder: Path) -> Path:
    return _pickled(folder, _holding(_tensor(_storage(4), 4, 1, offset=1)), {"0": bytes(16)})


def exchanged_storages(folder: Path) -> Path:
    pair = b"(" + _tensor(_storage(4, "0"), 4, 1) + _tensor(_storage(16, "1"), 16, 1) + b"t"
    return _pickled(folder, _holding(pair), {"0": bytes(64), "1": bytes(16)})


def deep_nesting(folder: Path) -> Path:
    return _pickled(folder, _holding(b"]" * 100_000 + b"a" * 99_999))


def deep_key(folder: Path) -> Path:
    """A tuple in a tuple in a tuple …, as a key: to hash it takes more stack than there is."""
    return _pickled(folder, b"\x80\x02}N" + b"\x85" * 900_000 + b"Ns.")


def deep_call(folder: Path) -> Path:
    call = b"\x85R"
    return _pickled(folder, b"\x80\x02}" + b"c_codecs\nencode\n" * 40_000 + b"N" + call * 40_000 + b"Ns.")


def itself(folder: Path) -> Path:
    return _pickled(folder, b"\x80\x02}q\x00" + _text("w") + b"h\x00s.")


def billion_laughs(folder: Path) -> Path:
    levels = b"".join(b"(" + bytes([ord("h"), n]) * 10 + b"tq" + bytes([n + 1]) for n in range(12))
    return _pickled(folder, _holding(b"(]q\x00" + levels + b"t"))


def memo_bomb(folder: Path) -> Path:
    return _pickled(folder, _holding(b"Nr" + struct.pack("<I", 2**31)))


def long_bytes(folder: Path) -> Path:
    return _pickled(folder, b"\x80\x05}" + _text("w") + b"\x96" + struct.pack("<Q", 2**40) + b"s.")


def many_opcodes(folder: Path) -> Path:
    return _pickled(folder, _holding(b"](" + b"N" * 20_000_000 + b"e"))


def many_records(folder: Path) -> Path:
    notes = [("x/data.pkl", _holding(b"N")), *((f"x/{name}", content) for name, content in _NOTES.items())]
    return archive(folder / "forged.pt", notes + [(f"x/data/{n}", b"") for n in range(400_000)])


def many_tensors_of_one_storage(folder: Path) -> Path:
    one = _tensor(_storage(4), 4, 1)
    return _pickled(folder, _holding(b"](" + one * 400_000 + b"e"), {"0": bytes(16)})


def name_upwards(folder: Path) -> Path:
    return archive(folder / "forged.pt", [("x/data.pkl", _holding(b"N")), ("x/../../canary", b"")])


def name_absolute(folder: Path) -> Path:
    return archive(folder / "forged.pt", [("x/data.pkl", _holding(b"N")), (f"{folder}/canary", b"")])


def same_name_twice(folder: Path) -> Path:
    return archive(folder / "forged.pt", [("x/data.pkl", _holding(b"N")), ("x/data.pkl", _holding(b"]"))])


def overlapping_records(folder: Path) -> Path:
    path = archive(folder / "forged.pt", [("x/data.pkl", _holding(b"N")), ("x/data/0", b"a" * 64)])
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")  # the last record now begins where the first one does
    content[entry + 42 : entry + 46] = bytes(4)
    path.write_bytes(content)
    return path


def hidden_between(folder: Path) -> Path:
    """Another directory further on, which a reader that searches would take."""
    path = reduce_pickle(folder)
    path.write_bytes(path.read_bytes() + b"tail")
    return path


def zip_of_python(folder: Path) -> Path:
    path = folder / "forged.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", _holding(b"N"))
        file.writestr("x/code/__torch__.py", "import os")
    return path


def no_dict(folder: Path) -> Path:
    return _pickled(folder, b"\x80\x02].")


def _state(folder: Path, step: Any, name: str = "checkpoint_step_7.pt") -> Path:
    path = folder / name
    torch.save({"step": step}, path)
    return path


def negative_step(folder: Path) -> Path:
    return _state(folder, -1)


def endless_step(folder: Path) -> Path:
    return _state(folder, 10**30)


def other_step(folder: Path) -> Path:
    return _state(folder, 8)


def fractional_step(folder: Path) -> Path:
    return _state(folder, 7.5)


def link_out(folder: Path) -> Path:
    (folder / "elsewhere").mkdir()
    target = checkpoint.save_checkpoint({"step": 7}, folder / "elsewhere" / "checkpoint_step_7.pt")
    link = folder / "checkpoint_step_7.pt"
    link.symlink_to(target)
    return link


CHECKPOINTS: dict[Callable[[Path], Path], str] = {
    reduce_pickle: "names posix.system",
    bare_pickle: "does not end as a zip file",
    eval_by_name: "names builtins.eval",
    deflated_bomb: "is compressed",
    huge_storage: "says that storage '0' has 4,000,000,000,000 bytes, and the file has 16",
    huge_tensor: "ends at byte 4,000,000,000,000 of a storage of 16",
    expanded_tensor: "16 bytes for it",
    beyond_its_storage: "ends at byte 20 of a storage of 16",
    exchanged_storages: "says that storage '0' has 16 bytes, and the file has 64",
    deep_nesting: "nested over 64 deep",
    deep_key: "nested over 64 deep",
    deep_call: "nested over 64 deep",
    itself: "nested over 64 deep",
    billion_laughs: "parts",
    memo_bomb: "stores in place 2147483648 when 0 are taken",
    long_bytes: "in a bytearray8",
    many_opcodes: "opcodes",
    many_records: "400003 records",
    many_tensors_of_one_storage: "pickle has",
    name_upwards: "record 'x/../../canary'",
    name_absolute: "which torch.save does not write",
    same_name_twice: "two records 'x/data.pkl'",
    overlapping_records: "begins at byte 0",
    hidden_between: "does not end as a zip file",
    zip_of_python: "record 'x/code/__torch__.py'",
    no_dict: "holds a list",
    negative_step: "holds step -1",
    endless_step: "holds step 1000000000000000000000000000000",
    other_step: "holds step 8, not that of its name",
    fractional_step: "holds step 7.5",
    link_out: "leads out of its folder",
}


# -- adapters ------------------------------------------------------------------------------------------------------


def _safetensors(folder: Path, header: bytes, content: bytes = b"", length: int | None = None) -> Path:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    size = len(header) if length is None else length
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", size) + header + content)
    return folder


def _entry(begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def pickle_named_safetensors(folder: Path) -> Path:
    _safetensors(folder, b"")
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"w": _Touch(folder)}, protocol=2))
    return folder


def zip_named_safetensors(folder: Path) -> Path:
    _safetensors(folder, b"")
    os.replace(reduce_pickle(folder), folder / "adapter_model.safetensors")
    return folder


def same_tensor_twice(folder: Path) -> Path:
    a, b = json.dumps(_entry(0, 8)), json.dumps(_entry(0, 8, "I32"))
    return _safetensors(folder, f'{{"w": {a}, "w": {b}}}'.encode(), bytes(8))


def overlapping_tensors(folder: Path) -> Path:
    return _safetensors(folder, json.dumps({"a": _entry(0, 8), "b": _entry(4, 12)}).encode(), bytes(12))


def tensor_beyond_the_file(folder: Path) -> Path:
    return _safetensors(folder, json.dumps({"a": _entry(0, 2**40)}).encode(), bytes(12))


def huge_header(folder: Path) -> Path:
    return _safetensors(folder, b"{}", length=2**60)


def deep_header(folder: Path) -> Path:
    return _safetensors(folder, b'{"a": ' + b"[" * 15_000 + b"]" * 15_000 + b"}")


def crowded_header(folder: Path) -> Path:
    return _safetensors(folder, b'{"a": [' + b"[]," * 5_000_000 + b"[]]}")


def many_tensors(folder: Path) -> Path:
    entries = ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(400_000))
    return _safetensors(folder, f"{{{entries}}}".encode())


def tensor_name_upwards(folder: Path) -> Path:
    return _safetensors(folder, json.dumps({"../../canary": _entry(0, 8)}).encode(), bytes(8))


def tensor_not_finite(folder: Path) -> Path:
    key = "base_model.model.0.lora_A.weight"
    return _safetensors(
        folder, json.dumps({key: _entry(0, 8)}).encode(), struct.pack("<ff", 1.0, float("nan"))
    )


def huge_config(folder: Path) -> Path:
    _safetensors(folder, json.dumps({"a": _entry(0, 8)}).encode(), bytes(8))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "a": [' + "[]," * 5_000_000 + "[]]}")
    return folder


ADAPTERS: dict[Callable[[Path], Path], str] = {
    pickle_named_safetensors: "cannot be read",
    zip_named_safetensors: "cannot be read",
    same_tensor_twice: "two entries 'w'",
    overlapping_tensors: "overlap",
    tensor_beyond_the_file: "tensors overlap, or leave gaps",
    huge_header: "bytes long",
    deep_header: "nested too deeply",
    crowded_header: "more in it than tensors",
    many_tensors: "bytes long",
    tensor_name_upwards: "../../canary",
    tensor_not_finite: "base_model.model.0.lora_A.weight holds values that are not finite",
    huge_config: "which is no config",
}
