"""Which parameters Muon is for: the matrices between a model's input and output.

Orthogonalising an update makes sense for a matrix that maps one hidden space to another. An embedding is a table and a
head has a row a class: both train better with AdamW, like everything that is no matrix (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). What a parameter is follows from where it lies, never from its name:

    Muon    weights of Linear layers (also transformers' Conv1D) and of MultiheadAttention, and what is adapted to them
            stacks of expert matrices (experts, rows, columns): each expert's matrix by itself
            convolution kernels as (out, in·∏k), if asked for
    AdamW   embeddings; the head; whatever shares its tensor with one of them; vectors; the rest, with the reason

The head is what `get_output_embeddings()` names (transformers' convention), or else the last Linear layer outside of
any ModuleList. Layers that are read as neither can be named with `exclude`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from orbit.core.names import did_you_mean


@dataclass(frozen=True)
class Split:
    """Which part trains which parameter.

    Attributes:
        muon: parameter's name → how it is read: "matrix", "stack" or "kernel".
        adamw: parameter's name → why it is none of Muon's.
    """

    muon: dict[str, str]
    adamw: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.muon)} parameters with Muon, {len(self.adamw)} with AdamW"]
        for title, part in (("Muon ", self.muon), ("AdamW", self.adamw)):
            lines += [f"  {title}  {name}: {why}" for name, why in part.items()]
        return "\n".join(lines)


def split(model: nn.Module, *, conv: bool = False, exclude: Sequence[str] = ()) -> Split:
    """Divide the parameters of `model` that train; the rules are at the top of this file.

    Args:
        conv: convolution kernels are Muon's too, as matrices (out, in·∏k).
        exclude: names or globs of parameters or modules that AdamW trains all the same.

    Raises:
        ValueError: a name in `exclude` that matches nothing.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 10))
    >>> print(split(model))
    1 parameters with Muon, 6 with AdamW
      Muon   1.weight: matrix
      AdamW  0.weight: embedding
      AdamW  1.bias: vector
      AdamW  2.weight: vector
      AdamW  2.bias: vector
      AdamW  3.weight: head
      AdamW  3.bias: vector
    """
    if isinstance(exclude, str):
        raise ValueError(f"exclude={exclude!r} is one string: give a list of names, [{exclude!r}]")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    excluded = {pattern: {name for name in names if _matches(name, pattern)} for pattern in exclude}
    for pattern, found in excluded.items():
        if not found:
            known = [*names, *(name for name, _ in model.named_modules() if name)]
            raise ValueError(
                f"exclude={pattern!r} matches no parameter that trains{did_you_mean(pattern, known)}"
            )
    tables = {
        id(p): "embedding"
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
    }
    heads = set(map(id, _heads(model)))
    muon, adamw = dict[str, str](), dict[str, str]()
    for name in names:
        p = model.get_parameter(name)
        around = list(_enclosing(name, model))
        if any(name in found for found in excluded.values()):
            adamw[name] = "excluded"
        elif p.ndim < 2:
            adamw[name] = "vector"
        elif id(p) in tables:
            adamw[name] = (
                "embedding" if isinstance(around[0], nn.Embedding | nn.EmbeddingBag) else "tied head"
            )
        elif heads & set(map(id, around)):
            adamw[name] = "head"
        else:
            reading, why = _reading(p, around, conv)
            (muon if reading else adamw)[name] = reading or why
    return Split(muon, adamw)


def _reading(p: nn.Parameter, around: list[nn.Module], conv: bool) -> tuple[str, str]:
    """How Muon reads a parameter of two or more dimensions; or "" and the reason why it does not."""
    for module in around:
        if is_linear(module):
            return ("matrix", "") if p.ndim == 2 else ("", f"{p.ndim} dimensions in a linear layer")
        if isinstance(module, _ConvNd):
            return ("kernel", "") if conv else ("", "convolution (conv=True gives it to Muon)")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return "", "part of an embedding"
    if p.ndim == 3 and min(p.shape) > 1:
        return "stack", ""
    return "", "of no linear layer"


def is_linear(module: nn.Module) -> bool:
    """A layer whose 2-D parameters are matrices."""
    transformers: Any = sys.modules.get("transformers.pytorch_utils")
    kinds = (nn.Linear, nn.MultiheadAttention, *((transformers.Conv1D,) if transformers is not None else ()))
    return isinstance(module, kinds)


def _heads(model: nn.Module) -> list[nn.Module]:
    named = [
        head
        for module in model.modules()
        if callable(find := getattr(module, "get_output_embeddings", None))
        and isinstance(head := find(), nn.Module)
    ]
    if named:
        return named
    last: nn.Module | None = None
    listed: set[int] = set()  # what lies in a ModuleList, or in another linear layer
    for module in model.modules():
        if isinstance(module, nn.ModuleList) or is_linear(module):
            listed |= {id(part) for part in module.modules() if part is not module}
        if isinstance(module, nn.Linear):
            last = module
    return [] if last is None or id(last) in listed else [last]


def _enclosing(name: str, model: nn.Module) -> Iterator[nn.Module]:
    """The modules around a parameter, innermost first."""
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        yield model.get_submodule(".".join(path[:depth]))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")
