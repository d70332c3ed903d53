"""`orbit list`: which components a config can name, each with its first sentence and its arguments."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orbit.config import ConfigError
from orbit.core.components import ComponentError
from orbit.core.names import did_you_mean
from orbit.pipeline.registries import REGISTRIES


def described(kind: str) -> list[dict[str, str]]:
    """Every component of a kind: its name, the first line of its docstring, its arguments.

    One of somebody else's package that cannot be imported is listed with the reason in the place of its docstring.

    Raises:
        ConfigError: no such kind.

    >>> [one["arguments"] for one in described("objectives") if one["name"] == "CausalLM"]
    ['(ignore_index=-100)']
    """
    if kind not in REGISTRIES:
        raise ConfigError(
            f"there are no {kind!r}{did_you_mean(kind, REGISTRIES)}; there are: {', '.join(REGISTRIES)}"
        )
    found = []
    for name in REGISTRIES[kind]:
        try:
            line, arguments = REGISTRIES[kind].describe(name)
        except (ComponentError, ImportError) as error:
            line, arguments = str(error), ""
        found.append({"name": name, "is": line, "arguments": arguments})
    return found


def list_components(kind: str | None, console: Console, as_json: bool = False) -> None:
    """Print the components of a kind, or of all. Raises as `described`."""
    kinds = {one: described(one) for one in ([kind] if kind else REGISTRIES)}
    if as_json:
        console.out(json.dumps(kinds, indent=1), highlight=False)
        return
    for one, components in kinds.items():
        if not components:
            console.print(f"no {one} are registered", style="dim")
            continue
        table = Table("", "arguments", title=one, title_justify="left", show_lines=False, box=None)
        for component in components:
            table.add_row(
                Text.assemble((component["name"], "bold"), "\n", component["is"]),
                Text(component["arguments"]),
            )
        console.print(table)
