"""Rows from where they lie: a file, a folder, a hub, or memory.

read_rows(path="questions.jsonl")                          jsonl, json, csv, parquet
read_rows(path="locuslab/TOFU", name="full", split="train")   what `datasets.load_dataset` takes
read_rows(rows=[{"question": ..., "answer": ...}])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orbit.core.extras import need
from orbit.core.names import did_you_mean

Row = Mapping[str, Any]


class DataError(ValueError):
    """Data that cannot be read, or that is not what a dataset needs."""


def read_rows(path: str | None = None, rows: Sequence[Row] | None = None, **hf_args: Any) -> Sequence[Row]:
    """The rows, each a mapping of columns.

    Raises:
        DataError: no such file, unreadable text, no row.
    """
    if rows is not None:
        found: Sequence[Row] = list(rows)
    elif path is None:
        raise DataError("a dataset needs hf_args.path (a file or a hub name) or rows")
    elif path == "facts":
        from orbit.demo.facts import load_facts

        found = [{"question": f.question, "answer": f.answer} for f in load_facts()]
    elif Path(path).suffix == ".jsonl":
        found = _jsonl(Path(path))
    else:
        need("llm", "datasets")
        import datasets

        found = datasets.load_dataset(path, **hf_args)
    if not len(found):
        raise DataError(f"{path or 'rows'} holds no row")
    return found


def require_columns(rows: Sequence[Row], *columns: str, where: str) -> None:
    """DataError where the first row lacks a column."""
    for column in columns:
        if column not in rows[0]:
            have = sorted(rows[0])
            raise DataError(f"{where} has no column {column!r}{did_you_mean(column, have)}; it has {have}")


def _jsonl(path: Path) -> list[Row]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}, is no JSON: {error}") from error
    return rows
