"""Configs: plain dicts in Python files, merged, overridden and written back (document 003).

    cfg = load_config("configs/finetune.py")                       one file, its parents first
    cfg = load_config(["configs/base.py", "configs/long.yaml"])    several: later ones go over earlier ones
    apply_overrides(cfg, ["optimizer.lr=1e-3", "hooks+=wandb"])    what a command line says
    save_config(cfg, "runs/1/config.py")                           loads again, equal

A Python file has a `config`, a dict or a function that returns one, and may have `parents`, a path or a list of
them relative to the file. A yaml or json file is the dict, and may have the key `parents`. Merging goes key by
key: two dicts are merged, anything else replaces what was there, DELETE takes a key away, and REPLACE(value) puts a
dict in the place of another instead of merging the two.

A Python config is code and runs with your rights. One that lies outside the working tree, in a folder that somebody
sent you, say, is only run with `trust=True`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import math
import os
import pprint
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orbit.core.extras import need
from orbit.core.files import replace_synced
from orbit.core.names import did_you_mean


class ConfigError(ValueError):
    """A config file, an override or a value that cannot be what it is asked to be."""


class _Delete:
    """The type of DELETE."""

    def __repr__(self) -> str:
        return "DELETE"


DELETE = _Delete()


class REPLACE:
    """`REPLACE(value)` in an override: this value as it is, where two dicts would be merged."""

    def __init__(self, value: Any, /) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"REPLACE({self.value!r})"


def load_config(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    params: Mapping[str, Any] | None = None,
    *,
    trust: bool = False,
) -> dict[str, Any]:
    """The merged config of one file or several, their parents first, depth first, left to right.

    Args:
        params: arguments for the files whose `config` is a function; each takes those that it names. A default is
            the one of the last file that has one, for all of them.
        trust: also run Python files outside the working tree.

    Raises:
        ConfigError: a file is absent, has no config, is its own ancestor, lies outside the working tree, or a
            parameter that no file takes. Whatever a Python file raises is passed on.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ConfigError("load_config([]): there is no file to load")
    parts = [part for one in paths for part in _parts(Path(one), trust, ())]
    defaults: dict[str, Any] = {}
    taken: set[str] = set()
    for part in parts:
        taken |= part.arguments.keys()
        defaults.update({k: v for k, v in part.arguments.items() if v is not inspect.Parameter.empty})
    given = dict(params or {})
    for name in given.keys() - taken:
        raise ConfigError(
            f"no config takes a parameter {name!r}; they take {sorted(taken)}{did_you_mean(name, taken)}"
        )
    merged: dict[str, Any] = {}
    for part in parts:
        merged = merge(merged, part.value(defaults | given))
    return merged


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A new dict, `base` with `over` on top of it by the module's rules. Neither is changed.

    >>> merge({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"x": DELETE}, "b": [2], "c": REPLACE({"z": 1})})
    {'a': {'y': 2}, 'b': [2], 'c': {'z': 1}}
    """
    merged = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in over.items():
        if value is DELETE:
            merged.pop(key, None)
        elif isinstance(value, REPLACE):
            merged[key] = copy.deepcopy(value.value)
        elif isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


# -- files -------------------------------------------------------------------------------------------------------


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Part(NamedTuple):
    """One file's own config."""

    path: Path
    config: Any
    arguments: dict[str, Any]  # of a function, with their defaults

    def value(self, known: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self.config
        if callable(found):
            absent = self.arguments.keys() - known.keys()
            if absent:
                raise ConfigError(f"{self.path}: config() needs params={{{sorted(absent)[0]!r}: ...}}")
            found = found(**{name: known[name] for name in self.arguments})
        if not isinstance(found, Mapping):
            raise ConfigError(f"{self.path}: its config is a {type(found).__name__} and must be a dict")
        return found


def _parts(path: Path, trust: bool, children: tuple[Path, ...]) -> Iterator[_Part]:
    """The parts of a file's ancestors, then its own."""
    path = path.resolve()
    if path in children:
        raise ConfigError(f"{path} is its own ancestor: {' → '.join(str(p) for p in (*children, path))}")
    if not path.is_file():
        asked = f", a parent of {children[-1]}" if children else ""
        raise ConfigError(f"there is no config file {path}{asked}")
    if path.suffix == ".py":
        parents, config = _from_python(path, trust)
    elif path.suffix in (".yaml", ".yml", ".json"):
        config = _from_text(path)
        parents = config.pop("parents", ())
    else:
        raise ConfigError(f"{path}: a config file ends in .py, .yaml, .yml or .json")
    for parent in [parents] if isinstance(parents, (str, os.PathLike)) else parents:
        yield from _parts(path.parent / parent, trust, (*children, path))
    yield _Part(path, config, _arguments(path, config) if callable(config) else {})


def _from_python(path: Path, trust: bool) -> tuple[Any, Any]:
    if not trust and Path.cwd().resolve() not in path.parents:
        raise ConfigError(
            f"{path} lies outside the working tree {Path.cwd()}, and a Python config runs as code; if you trust it, "
            "load_config(..., trust=True)"
        )
    found = runpy.run_path(str(path), run_name=f"orbit_config_{path.stem}")
    if "config" not in found:
        raise ConfigError(f"{path} has no `config`, a dict or a function that returns one")
    return found.get("parents", ()), found["config"]


def _from_text(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no {path.suffix[1:]}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__} and must hold a dict")
    return found


def _yaml(text: str) -> Any:
    yaml, loader, _ = _yaml_kinds()
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _yaml_kinds() -> tuple[Any, Any, Any]:
    """PyYAML, and a safe loader and dumper of it that take 1e-3 for a number, as YAML 1.2 does and PyYAML does not."""
    need("llm", "yaml")
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):
        kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return yaml, Loader, Dumper


def _arguments(path: Path, config: Any) -> dict[str, Any]:
    parameters = inspect.signature(config).parameters.values()
    for one in parameters:
        if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            raise ConfigError(f"{path}: config({one}): its parameters must have names")
    return {one.name: one.default for one in parameters}


# -- overrides ---------------------------------------------------------------------------------------------------

_OVERRIDE = re.compile(r"(?P<path>[^=]*?)(?P<operation>\+=|-=|!=|=)(?P<value>.*)", re.DOTALL)
_STEP = re.compile(
    r"(?:(?:^|\.)(?P<name>[^.\[\]]+))|\[(?P<index>-?\d+)\]|\[(?P<quote>['\"])(?P<key>.*?)(?P=quote)\]"
)
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def apply_overrides(cfg: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Change `cfg` in place, as a command line says, and return it.

        a.b[0]=1      assign; the last key may be new, what leads to it must be there
        hooks+=wandb  append to a list       hooks-=wandb  take the first equal item out of it
        x!=           delete a key or an item

    Values are Python literals, or true, false, null, also inside of lists and dicts; any other word is a string. A key
    with dots is written a["b.c"].

    Raises:
        ConfigError: naming the override and the part of its path that does not fit; `cfg` is unchanged.

    >>> apply_overrides({"lr": 1, "hooks": ["log"]}, ["lr=1e-3", "hooks+=wandb"])
    {'lr': 0.001, 'hooks': ['log', 'wandb']}
    >>> apply_overrides({}, ["tasks=[math, chat]", "flags={'fast': true}"])
    {'tasks': ['math', 'chat'], 'flags': {'fast': True}}
    """
    changed = copy.deepcopy(cfg)
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match is not None and match["path"].strip().startswith("-"):
            raise ConfigError(
                f"override {override!r}: a path has no dashes in front; write {override.lstrip(' -')!r}"
            )
        if match is None or not match["path"].strip():
            raise ConfigError(f"override {override!r}: write path=value, path+=item, path-=item or path!=")
        _apply(changed, override, _steps(override, match["path"].strip()), match["operation"], match["value"])
    cfg.clear()
    cfg.update(changed)
    return cfg


def _steps(override: str, path: str) -> list[str | int]:
    steps: list[str | int] = []
    at = 0
    while at < len(path):
        match = _STEP.match(path, at)
        if match is None:
            raise ConfigError(f"override {override!r}: {path[at:]!r} is no step of a path such as a.b[0]")
        index = match["index"]
        steps.append(int(index) if index is not None else match["name"] or match["key"] or "")
        at = match.end()
    return steps


def _apply(cfg: Any, override: str, steps: list[str | int], operation: str, text: str) -> None:
    *way, last = steps
    node: Any = cfg
    for depth, step in enumerate(way):
        node = node[_found(node, step, override, steps[:depth])]
    if operation == "!=":
        if text.strip():
            raise ConfigError(f"override {override!r}: path!= deletes and takes no value")
        del node[_found(node, last, override, way)]
        return
    value = _literal(text)
    if operation == "=":
        new = isinstance(node, dict) and isinstance(last, str)
        node[last if new else _found(node, last, override, way)] = value
        return
    items = node[_found(node, last, override, way)]
    if not isinstance(items, list):
        raise ConfigError(f"override {override!r}: {_shown(steps)} is a {type(items).__name__} and no list")
    if operation == "+=":
        items.append(value)
    elif value in items:
        items.remove(value)
    else:
        raise ConfigError(f"override {override!r}: {value!r} is not in {_shown(steps)} = {items!r}")


def _found(node: Any, step: str | int, override: str, way: Sequence[str | int]) -> Any:
    """The step, if `node`, which lies at `way`, has it."""
    where = _shown(way) if way else "the config"
    if isinstance(node, dict):
        if step not in node:
            names = [str(key) for key in node]
            raise ConfigError(
                f"override {override!r}: {where} has no key {step!r}{did_you_mean(str(step), names)}"
            )
    elif isinstance(node, list):
        if not isinstance(step, int) or not -len(node) <= step < len(node):
            raise ConfigError(f"override {override!r}: {where} is a list of {len(node)}, without [{step!r}]")
    else:
        raise ConfigError(f"override {override!r}: {where} is a {type(node).__name__}, with nothing below it")
    return step


def _shown(steps: Sequence[str | int]) -> str:
    return "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).removeprefix(".")


def _literal(text: str) -> Any:
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        tree = ast.parse(text, mode="eval")
        if isinstance(tree.body, (ast.List, ast.Tuple, ast.Dict, ast.Set)):
            tree = _Words().visit(tree)
        return ast.literal_eval(tree)
    except (
        ValueError,
        SyntaxError,
        MemoryError,
        RecursionError,
    ):  # no literal, or one too deep to be meant as one
        return text


class _Words(ast.NodeTransformer):
    """Bare words in a list or dict are what they would be alone."""

    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant(_WORDS.get(node.id.lower(), node.id))


# -- writing -----------------------------------------------------------------------------------------------------


def save_config(cfg: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a config as `.py`, `.yaml` or `.json`, so that `load_config` gives it back equal.

    The file appears whole or not at all.

    Raises:
        ConfigError: another ending, or a value that the format cannot hold, named by its path.
    """
    path = Path(path)
    suffix = path.suffix
    if suffix not in (".py", ".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: a config file ends in .py, .yaml, .yml or .json")
    if suffix != ".py" and "parents" in cfg:
        raise ConfigError(f"{path}: its key 'parents' would name other files there; write a .py instead")
    plain = _plain(dict(cfg), (), python=suffix == ".py")
    if suffix == ".py":
        text = f"config = {pprint.pformat(plain, width=100, sort_dicts=False)}\n"
    elif suffix == ".json":
        text = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    else:
        yaml, _, dumper = _yaml_kinds()
        text = yaml.dump(plain, Dumper=dumper, sort_keys=False, allow_unicode=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_synced(path, text.encode("utf-8"))
    return path


def _plain(value: Any, way: tuple[str | int, ...], *, python: bool) -> Any:
    """The value, if the file can hold it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value) or not python:
            return value
    elif isinstance(value, Mapping):
        if python or all(isinstance(key, str) for key in value):
            return {key: _plain(one, (*way, key), python=python) for key, one in value.items()}
    elif isinstance(value, list) or (python and isinstance(value, tuple)):
        return type(value)(_plain(one, (*way, k), python=python) for k, one in enumerate(value))
    kinds = "numbers, strings, booleans, None, lists and dicts" + (
        " and tuples" if python else " with names for keys"
    )
    raise ConfigError(f"{_shown(way)} = {value!r} cannot be written; the file holds {kinds}")
