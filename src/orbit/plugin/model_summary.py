"""What the model is made of: its modules with their parameters, what of them trains, shapes, dtypes and sizes.

`summarise(model)` counts; the plugin adds the shapes that modules see in the run's own first batch, without a forward
of its own, and prints. A parameter that several modules share is counted where it comes first, and the others say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from orbit import adapter
from orbit.core import runtime
from orbit.core.events import Plugin

if TYPE_CHECKING:
    from orbit.core.loop import Core

_MOST_SHAPES = 3  # of one module's inputs or outputs that are shown


@dataclass(frozen=True)
class Row:
    """One module, or one task's adapters. Counts and sizes are those of everything below it.

    Attributes:
        name: dotted, "" for the whole model.
        kind: the module's class; for a task what it is made of.
        parameters, trainable: numbers of elements. Of a sharded tensor, of the whole of it.
        size: bytes of parameters and buffers.
        dtypes: of its parameters, without "torch.".
        tied: first names of parameters that it shares with a module before it, and that are counted there.
        input, output: shapes that it saw, empty if it was not called.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    size: int
    dtypes: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    input: str = ""
    output: str = ""


@dataclass(frozen=True)
class Summary:
    """A model's modules, itself first, and its adapters by task."""

    rows: tuple[Row, ...]
    tasks: tuple[Row, ...] = ()

    @property
    def total(self) -> Row:
        return self.rows[0]

    def table(self) -> Table:
        """For a rich console."""
        shapes = any(row.input or row.output for row in self.rows)
        frozen = self.total.parameters - self.total.trainable
        table = Table(
            caption=f"{self.total.parameters:,} parameters, {self.total.trainable:,} of them train and {frozen:,} are "
            f"frozen; {self.total.size / 2**20:,.2f} MiB",
            caption_justify="left",
        )
        table.add_column("module", overflow="fold")
        table.add_column("kind", overflow="fold")
        for heading in ("parameters", "trains", "MiB"):
            table.add_column(heading, justify="right")
        for heading in ["dtype", *(["input", "output"] if shapes else [])]:
            table.add_column(heading, overflow="fold")
        for row in (*self.rows, *self.tasks):
            if self.tasks and row is self.tasks[0]:
                table.add_section()
            seen = [row.input, row.output] if shapes else []
            table.add_row(row.name or "(model)", *_cells(row), *seen)
        return table


def summarise(model: nn.Module, max_depth: int = 2) -> Summary:
    """Count what `model` has, module by module, down to `max_depth` levels below it (-1: all).

    Adapters count in the layers that carry them and are listed by task, not as modules.

    >>> shared = nn.Linear(4, 4, bias=False)
    >>> for row in summarise(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))).rows:
    ...     print(f"{row.name or '(model)':8} {row.kind:10} {row.parameters:3} {row.size:4}")
    (model)  Sequential  26  104
    0        Linear      16   64
    1        ReLU         0    0
    3        Linear      10   40
    """
    first = dict(model.named_parameters())  # each under its first name
    of_tasks = {id(p) for p in adapter.adapter_parameters(model).values()} if adapter.tasks(model) else set()
    rows = []
    for name, module in model.named_modules():
        own = list(module.parameters())
        if max_depth >= 0 and name.count(".") + bool(name) > max_depth:
            continue
        if name and own and all(id(p) in of_tasks for p in own):
            continue
        rows.append(_row(name, module, first))
    return Summary(tuple(rows), tuple(_task_row(model, task) for task in adapter.tasks(model)))


class ModelSummary(Plugin):
    """Print a table of the model's modules once the first batch has shown their shapes.

    Args:
        max_depth: levels below the model, -1 for all.
        console: where to print; only rank 0 does.

    Attributes:
        summary: a `Summary` with shapes, after the first batch. A compiled model is not looked into while it runs: its
            summary has no shapes.

    Raises:
        ValueError: max_depth is under -1.
    """

    priority = Plugin.MONITOR

    def __init__(self, max_depth: int = 2, console: Console | None = None) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"ModelSummary(max_depth={max_depth!r}): levels below the model, or -1 for all")
        self.max_depth, self.console = max_depth, console
        self.summary: Summary | None = None
        self._shapes: dict[str, tuple[str, str]] = {}
        self._hooks: list[Any] = []

    def on_before_batch(self, trainer: Core) -> None:
        model = trainer.unwrapped_model
        if self.summary is not None or self._hooks or _compiled(trainer.model):
            return
        rows = {row.name for row in summarise(model, self.max_depth).rows}
        for name, module in model.named_modules():
            if name in rows:
                hook = partial(self._see, name)
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def on_before_eval(self, trainer: Core) -> None:
        self._unhook()

    def on_after_batch(self, trainer: Core) -> None:
        self._unhook()
        if self.summary is not None:
            return
        counted = summarise(trainer.unwrapped_model, self.max_depth)
        nothing = ("", "")
        seen = ((row, self._shapes.get(row.name, nothing)) for row in counted.rows)
        rows = tuple(replace(row, input=given, output=made) for row, (given, made) in seen)
        self.summary = replace(counted, rows=rows)
        if runtime.is_main_process():
            console = self.console or getattr(trainer, "console", None) or Console()
            console.print(self.summary.table())

    def on_close(self, trainer: Core) -> None:
        self._unhook()

    def _see(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name not in self._shapes:
            self._shapes[name] = (_shapes([args, kwargs]), _shapes(output))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _row(name: str, module: nn.Module, first: dict[str, nn.Parameter]) -> Row:
    inside = {key: p for key, p in first.items() if not name or key == name or key.startswith(f"{name}.")}
    counted = {id(p) for p in inside.values()}
    elsewhere = {id(p): key for key, p in first.items() if id(p) not in counted}
    tied = [elsewhere[id(p)] for p in module.parameters() if id(p) in elsewhere]
    return _count(name, type(module).__name__, inside.values(), module.buffers(), tuple(tied))


def _task_row(model: nn.Module, task: str) -> Row:
    layers = len(adapter.task_layers(model, task))
    kind = f"adapter of {layers} layer{'s' * (layers != 1)}, r={adapter.task_config(model, task).r}"
    return _count(f"task {task!r}", kind, adapter.adapter_parameters(model, task).values())


def _count(
    name: str,
    kind: str,
    parameters: Iterable[nn.Parameter],
    buffers: Iterable[Tensor] = (),
    tied: tuple[str, ...] = (),
) -> Row:
    own = list(parameters)
    return Row(
        name=name,
        kind=kind,
        parameters=sum(p.numel() for p in own),
        trainable=sum(p.numel() for p in own if p.requires_grad),
        size=sum(t.numel() * t.element_size() for t in (*own, *buffers)),
        dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in own})),
        tied=tied,
    )


def _cells(row: Row) -> list[str]:
    share = f"{100 * row.trainable / row.parameters:.4g} %" if row.parameters else ""
    tied = f" (shares {', '.join(row.tied)})" if row.tied else ""
    return [row.kind + tied, f"{row.parameters:,}", share, f"{row.size / 2**20:,.2f}", ", ".join(row.dtypes)]


def _shapes(value: Any) -> str:
    """Of the tensors in a nested value.

    >>> _shapes([(Tensor(2, 3),), {"mask": Tensor(2)}])
    '2×3, 2'
    """
    found = ["×".join(map(str, tensor.shape)) or "()" for tensor in _tensors(value)]
    return ", ".join(found[:_MOST_SHAPES] + ["…"] * (len(found) > _MOST_SHAPES))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
