"""A dataset from its section of a config: `{handler: NAME, args: {...}, cache: true, packing: 2048, shuffle: 0}`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orbit.core.components import ComponentError
from orbit.core.making import make
from orbit.core.names import did_you_mean
from orbit.data.once import once
from orbit.data.packing import Packed
from orbit.data.registry import DATASET_REGISTRY
from orbit.data.rows import Row, Rows
from orbit.data.sources import stream_rows
from orbit.data.streams import StreamDataset

_KEYS = ("handler", "args", "cache", "packing", "shuffle")


def build_dataset(
    name: str, section: Mapping[str, Any], template_args: Mapping[str, Any] | None, tokenizer: Any
) -> Any:
    """The dataset `name`: what is registered as its handler, or as its name, called with its args.

    `template_args` and `tokenizer` are the model's, for datasets that take them. Its samples are tokenised once
    and kept (`orbit.data.once`), unless `cache` is false. With `packing`, rows of so many tokens hold several of them
    (`orbit.data.packing`). With `hf_args.streaming` the rows are read while they are used, and
    `shuffle` of them wait to be drawn from (`orbit.data.streams`).

    Raises:
        ComponentError: no such dataset, another key, arguments that it does not take or lacks.
        What the dataset raises.
    """
    for key in section:
        if key not in _KEYS:
            raise ComponentError(
                f"dataset {name!r} has {key!r}{did_you_mean(str(key), _KEYS)}; a dataset has: {', '.join(_KEYS)}"
            )
    handler = section.get("handler") or name
    args = dict(section.get("args") or {})
    cache, packing = section.get("cache", True), section.get("packing")
    if not isinstance(cache, bool):
        raise ComponentError(f"dataset {name!r} has cache={cache!r}: true or false")
    if packing is not None and (not isinstance(packing, int) or isinstance(packing, bool) or packing < 2):
        raise ComponentError(
            f"dataset {name!r} has packing={packing!r}: the tokens of a row, or null for none"
        )
    component, where = DATASET_REGISTRY[handler], f"dataset {name!r}"

    def made(**changed: Any) -> Any:
        return make(component, {**args, **changed}, where, template_args=template_args, tokenizer=tokenizer)

    hf_args = args.get("hf_args")
    if isinstance(hf_args, Mapping) and hf_args.get("streaming"):
        if packing is not None:
            raise ComponentError(
                f"dataset {name!r} is a stream, which cannot be packed: its lengths are not known"
            )
        return _streamed(made, hf_args, section.get("shuffle", 0))
    if "shuffle" in section:
        raise ComponentError(
            f"dataset {name!r} has shuffle, which is for streams: loaders shuffle all other data"
        )
    settings = {**args, "template_args": template_args}
    dataset = once(made, component, settings, tokenizer) if cache else made()
    return dataset if packing is None else Packed(dataset, packing)


def _streamed(made: Callable[..., Any], hf_args: Mapping[str, Any], shuffle: int) -> StreamDataset:
    """Each row of the stream by a dataset of its own; the first one is made now, so that what is wrong is told."""
    stream = stream_rows(**hf_args)

    def encode(row: Row, number: int) -> Iterator[Any]:
        rows = made(hf_args={"rows": Rows([row], f"{stream.where} from row {number}")})
        return (rows[i] for i in range(len(rows)))

    data = StreamDataset(stream, encode, shuffle)
    next(encode(next(iter(stream)), 0))
    return data


def as_dataset(name: str, source: Any, template_args: Mapping[str, Any] | None, tokenizer: Any) -> Any:
    """`source` itself, or the dataset that it describes. Raises as `build_dataset`."""
    if isinstance(source, Mapping):
        return build_dataset(name, source, template_args, tokenizer)
    return source
