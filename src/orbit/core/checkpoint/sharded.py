"""A checkpoint of a sharded run: a folder in which every rank has written its own pieces.

    checkpoint_step_120/
        __0_0.distcp, __1_0.distcp …    the tensors of model and optimizer (torch.distributed.checkpoint)
        .metadata                       which piece of which tensor lies where
        state.pt                        everything else, as in a checkpoint of one file
        manifest.sha256                 the digests of them all

It is written under another name and renamed when all of it is on the disk. It loads on any number of ranks, sharded or
not: each reads the pieces of what it holds itself.

torch's `.metadata` is a pickle. It is read by an unpickler that knows the few classes of such a file and nothing else,
and only tensors are ever read from the pieces, so a folder from elsewhere runs no code.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orbit.core import runtime
from orbit.core.checkpoint.errors import CheckpointError
from orbit.core.checkpoint.manifest import is_valid, write_folder_manifest
from orbit.core.checkpoint.single import cannot_be_written, check_step, load_checkpoint, save_checkpoint
from orbit.core.files import aside, sync_folder
from orbit.core.ranks import on_main, shards

STATE = "state.pt"
_METADATA = ".metadata"
_LARGEST_METADATA = 64 << 20  # bytes; 1000 tensors on 8 ranks have 2 MB
_KNOWN = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "ChunkStorageMetadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, kind) for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")),
}


def save_sharded(state: dict[str, Any], path: Path, group: Any = None) -> Path:
    """Write a state whose tensors may lie in pieces to the folder `path`. Every rank calls it.

    Args:
        group: the ranks, as a process group of its own where something else communicates at the same time.

    Raises:
        CheckpointError: on every rank, if any of them could not write. Nothing at `path` has changed then.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    rest, tensors = _apart(state)
    alone = runtime.world_size() == 1
    with ExitStack() as stack:
        try:
            partial = on_main(lambda: _begin(stack, path), group)
            with _alone_without_warning():
                dcp.save(tensors, checkpoint_id=str(partial), process_group=group, no_dist=alone)
            on_main(lambda: _finish(rest, partial, path), group)
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            raise cannot_be_written(path, _of_all_ranks(error)) from error
    return path


def save_and_tidy(state: dict[str, Any], path: Path, tidy: Callable[[Path], None], group: Any = None) -> None:
    """Write a checkpoint to `path`, a file if it ends on `.pt` and else a folder, then call `tidy(path)` on rank 0.

    Every rank calls it. What one of them raises is raised on all; `group` and errors as in `save_sharded`.
    """
    if path.suffix == ".pt":
        on_main(lambda: tidy(save_checkpoint(state, path)), group)
    else:
        save_sharded(state, path, group)
        on_main(lambda: tidy(path), group)


def load_sharded(
    path: Path, model_state: dict[str, Any], optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """A state written by `save_sharded`, in pieces like those of this run. Every rank calls it; nothing live changes.

    Args:
        model_state: this run's own, for the shapes and places of its pieces.
        optimizer: its parameters say how their moments are cut.

    Raises:
        CheckpointError: the folder is not what was written, or holds what no checkpoint holds.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

    on_main(lambda: _verify(path))
    rest = load_checkpoint(path / STATE)
    check_step(rest, path)
    reader = _reader(path)
    stored = _tensors_in(reader.read_metadata(), path)
    owners: dict[str, Tensor] = {f"model.{key}": value for key, value in model_state.items()}
    if optimizer is not None and rest["optimizer"] is not None:
        of_moments = shards.moment_owners(optimizer, rest["optimizer"])
        owners |= {f"optimizer.{number}": parameter for number, parameter in of_moments.items()}
    targets = {
        key: _empty(owners.get(key, owners.get(key.rpartition(".")[0])), size, dtype)
        for key, (size, dtype) in stored.items()
    }
    try:
        with _alone_without_warning():
            dcp.load(targets, storage_reader=reader, no_dist=runtime.world_size() == 1)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be read: {_of_all_ranks(error)}") from error
    return _together(rest, targets)


def _of_all_ranks(error: BaseException) -> str:
    """What torch gathered from the ranks, without their tracebacks."""
    failures = getattr(error, "failures", None)
    return (
        "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in failures.items())
        if failures
        else str(error)
    )


@contextmanager
def _alone_without_warning() -> Iterator[None]:
    """torch warns a single process that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _apart(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What every rank has alike, and the tensors of model and optimizer by name."""
    tensors = {f"model.{key}": value for key, value in state["model"].items() if isinstance(value, Tensor)}
    rest = {
        **state,
        "model": {key: value for key, value in state["model"].items() if f"model.{key}" not in tensors},
    }
    if state["optimizer"] is not None:
        moments = state["optimizer"]["state"]
        tensors |= {
            f"optimizer.{number}.{name}": value
            for number, entries in moments.items()
            for name, value in entries.items()
            if isinstance(value, Tensor)
        }
        others = {
            number: {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
            for number, entries in moments.items()
        }
        rest["optimizer"] = {**state["optimizer"], "state": others}
    return rest, tensors


def _together(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    moments = (rest["optimizer"] or {}).get("state", {})
    keys = {str(key): key for key in moments}  # numbers, or parameters' names (`state_dict_options`)
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part == "model":
            rest["model"][name] = tensor
            continue
        owner, _, entry = name.partition(".")
        if owner not in keys:
            owner, _, entry = name.rpartition(".")
        if owner not in keys:
            raise CheckpointError(f"its metadata has a tensor {key!r}, which is no parameter's moment")
        moments[keys[owner]][entry] = tensor
    return rest


def _begin(stack: ExitStack, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = stack.enter_context(aside(path))
    partial.mkdir()
    return partial


def _finish(rest: dict[str, Any], partial: Path, path: Path) -> None:
    save_checkpoint(rest, partial / STATE)
    write_folder_manifest(partial)
    sync_folder(partial)
    with aside(path) as old:
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        sync_folder(path.parent)
    if not is_valid(path):
        raise CheckpointError(
            f"{path} was written and does not verify: the disk does not keep what it is given"
        )


def _verify(path: Path) -> None:
    if not is_valid(path):
        raise CheckpointError(
            f"{path} does not match its manifest: files were changed, added or removed; use an older checkpoint"
        )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _KNOWN or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not known:
            raise CheckpointError(f"its metadata names {module}.{name}, which no checkpoint's does")
        return super().find_class(module, name)


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            file = path / _METADATA
            if not file.is_file() or file.stat().st_size > _LARGEST_METADATA:
                raise CheckpointError(f"{file} is missing, or too large to be what it should be")
            try:
                with file.open("rb") as stream:
                    metadata = _Unpickler(stream).load()
            except CheckpointError:
                raise
            except Exception as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from error
            if not isinstance(metadata, Metadata):
                raise CheckpointError(
                    f"{file} holds a {type(metadata).__name__}, not a checkpoint's metadata"
                )
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


def _tensors_in(metadata: Any, path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every stored tensor; CheckpointError if there is anything else, or a file from elsewhere."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for info in (metadata.storage_data or {}).values():
        name = info.relative_path
        if os.path.basename(name) != name or not (path / name).is_file():
            raise CheckpointError(f"{path}: its metadata leads to {name!r}, which is no file of the folder")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or not key.startswith(("model.", "optimizer.")):
            raise CheckpointError(f"{path}: {key!r} in its metadata is no tensor of a model or an optimizer")
    available = sum(file.stat().st_size for file in path.glob("*.distcp"))
    sizes = {key: (entry.size, entry.properties.dtype) for key, entry in metadata.state_dict_metadata.items()}
    declared = sum(size.numel() * dtype.itemsize for size, dtype in sizes.values())
    if declared > available:
        raise CheckpointError(
            f"{path}: its metadata declares {declared} bytes of tensors and its files have {available}"
        )
    return sizes


def _empty(like: Tensor | None, size: torch.Size, dtype: torch.dtype) -> Tensor:
    if like is not None and shards.is_sharded(like) and like.shape == size:
        return torch.empty_like(like.detach(), dtype=dtype)
    return torch.empty(size, dtype=dtype)


def new_group() -> Any:
    """A process group for saving beside the training; None in a single process. Every rank calls it."""
    return dist.new_group(backend="gloo") if runtime.world_size() > 1 else None
