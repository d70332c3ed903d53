"""Is a checkpoint what was written? Its digests say so, in `sha256sum`'s format.

    checkpoint_step_9.pt.sha256           `<sha256>  checkpoint_step_9.pt`
    checkpoint_step_9/manifest.sha256     one such line for every file in the folder

Without them one flipped bit loads silently (298 times in 300 when it was tried). While a file is being replaced its
manifest has two lines: the old content is valid until the rename and the new one after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from orbit.core.files import replace_synced, sha256_of

MANIFEST = "manifest.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_LONGEST = 16 << 20  # bytes; a folder of 100,000 files has a manifest of about 10 MB


def manifest_of(path: Path) -> Path:
    """Where the digest of the file `path` lies."""
    return path.with_name(f"{path.name}.sha256")


def is_valid(path: Path) -> bool:
    """The file or folder is there, and is what its manifest says: all that it names, unchanged, and nothing else.

    A link counts as what it leads to, if that lies beside it.
    """
    target = path.resolve()
    if path.is_symlink() and target.parent != path.parent.resolve():
        return False
    return _folder_is_valid(target) if target.is_dir() else _file_is_valid(target)


def digests_of(path: Path) -> list[str]:
    """The digests that the manifest of the file `path` accepts; none if it is absent, damaged or of another file."""
    lines = _read(manifest_of(path))
    return [digest for digest, _ in lines] if {name for _, name in lines} == {path.name} else []


def write_manifest(path: Path, digests: Iterable[str]) -> None:
    """Write the manifest of the file `path`."""
    replace_synced(manifest_of(path), "".join(f"{digest}  {path.name}\n" for digest in digests).encode())


def write_folder_manifest(folder: Path) -> Path:
    """Write the manifest of a folder over the files that are in it now."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in sorted(_files(folder))]
    replace_synced(folder / MANIFEST, "".join(lines).encode())
    return folder / MANIFEST


def _file_is_valid(path: Path) -> bool:
    accepted = digests_of(path)
    return bool(accepted) and path.is_file() and sha256_of(path) in accepted


def _folder_is_valid(folder: Path) -> bool:
    lines = _read(folder / MANIFEST)
    if not lines or sorted(name for _, name in lines) != sorted(_files(folder)):
        return False
    return all(
        not (folder / name).is_symlink() and sha256_of(folder / name) == digest for digest, name in lines
    )


def _files(folder: Path) -> set[str]:
    """Names of all files below, but the manifest; links too, which no manifest accepts."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found} - {MANIFEST}


def _read(manifest: Path) -> list[tuple[str, str]]:
    """(digest, name) of every line; nothing if any line is no such line."""
    if not manifest.is_file() or manifest.is_symlink() or manifest.stat().st_size > _LONGEST:
        return []
    lines = manifest.read_bytes().decode("utf-8", "replace").splitlines()
    matches = [_LINE.fullmatch(line) for line in lines]
    return [(match[1], match[2]) for match in matches if match] if all(matches) else []
