"""Rows by `datasets`: a hub's name, a local folder, one of `save_to_disk`, or a loader's name with `data_files`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from orbit.core.extras import need
from orbit.core.names import did_you_mean
from orbit.data.rows import DataError


def load(path: str, streaming: bool = False, **hf_args: Any) -> Any:
    """One split, as `datasets.load_dataset` gives it: a Dataset, or an IterableDataset if `streaming`.

    Raises:
        DataError: it is not there, cannot be read, or has several splits and none is named.
    """
    need("llm", "datasets")
    import datasets

    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file():
            found = _from_disk(path, streaming, **hf_args)
        else:
            found = datasets.load_dataset(path, streaming=streaming, **hf_args)
    except DataError:
        raise
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        told = (
            error.__cause__ or error
            if isinstance(error, datasets.exceptions.DatasetGenerationError)
            else error
        )
        first = str(told).strip().split("\n", 1)[0]
        raise DataError(f"{path!r} cannot be loaded: {first or type(told).__name__}") from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise DataError(f"{path!r} has the splits {', '.join(found)}: choose one by hf_args.split")
        [found] = found.values()
    return found


def _from_disk(path: str, streaming: bool, split: str | None = None, **rest: Any) -> Any:
    """A folder of `save_to_disk`."""
    import datasets

    if rest:
        raise DataError(f"{path} was written by save_to_disk, and takes no {', '.join(rest)}; it takes split")
    found = datasets.load_from_disk(path)
    if split is not None:
        parts = found if isinstance(found, dict) else {"train": found}
        if split not in parts:
            raise DataError(
                f"{path} has no split {split!r}{did_you_mean(split, parts)}; it has {', '.join(parts)}"
            )
        found = parts[split]
    if not streaming:
        return found
    if isinstance(found, dict):
        return {name: part.to_iterable_dataset() for name, part in found.items()}
    return found.to_iterable_dataset()


def content_hash(table: Any) -> str:
    """A hash of every cell of a `datasets.Dataset` and of its columns' names and types."""
    import pyarrow

    digest = hashlib.sha256()
    for batch in table.with_format("arrow").iter(batch_size=10_000):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_table(batch)
        digest.update(sink.getvalue())
    return digest.hexdigest()
