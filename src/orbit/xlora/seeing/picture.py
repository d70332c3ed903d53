"""Scalings drawn by matplotlib: tokens downwards, layers to the right, one panel an expert, one colour scale.

Five panels stand abreast. Every token has a line with its text. A text of more than 200 tokens keeps its height, and
every second, third, … token is named, with its place. A character that the font lacks stands as its number,
since matplotlib would draw a box and warn; `page.py` shows it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbit.core.extras import need
from orbit.xlora.errors import XLoRAError
from orbit.xlora.seeing.names import shown, without_common

if TYPE_CHECKING:
    from orbit.xlora.seeing.scalings import Scalings

ROW, TALLEST = 0.19, 200  # inches a token; tokens that are all named
COLUMN = 0.16  # inches a layer that is named
ABREAST = 5  # panels in a row


def write(scalings: Scalings, path: str | os.PathLike[str]) -> None:
    """Draw `scalings` to a file whose suffix matplotlib knows.

    Raises:
        MissingExtraError: matplotlib is not installed. XLoRAError: another suffix.
    """
    need("plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise XLoRAError(f"{path.name}: a picture of scalings is .html or one of {sorted(known)}")
    figure = draw(scalings)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw(scalings: Scalings) -> Any:
    """The matplotlib Figure of `scalings`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seq, layers, experts = scalings.values.shape
    every = -(-seq // TALLEST)
    width = min(5.0, max(1.8, 0.07 * layers))
    columns = min(experts, ABREAST)
    rows = -(-experts // columns)
    figure = Figure(
        figsize=(1.9 + columns * (width + 0.25) + 0.6, rows * (1.9 + ROW * min(seq, TALLEST))),
        layout="constrained",
        dpi=110,
    )
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels, spare = places.flat[:experts], places.flat[experts:]
    for place in spare:
        place.remove()
    low = min(0.0, float(scalings.values.min()))
    high = max(float(scalings.values.max()), low + 1e-6)
    for k, (panel, expert) in enumerate(zip(panels, scalings.experts, strict=True)):
        image = panel.imshow(
            scalings.values[:, :, k].numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=low,
            vmax=high,
        )
        panel.set_title(
            f"{_drawable(shown(expert))}\nmean {scalings.values[:, :, k].mean():.2f}",
            parse_math=False,
            fontsize=9,
        )
        _name_layers(panel, scalings.layers, most=int(width / COLUMN))
    names = [
        _drawable(shown(token)) + (f"  {at * every}" if every > 1 else "")
        for at, token in enumerate(scalings.tokens[::every])
    ]
    for first in places[:, 0]:
        first.set_yticks(range(0, seq, every))
        first.set_yticklabels(names, fontsize=8, parse_math=False)
    bar = figure.colorbar(
        image, ax=list(panels), aspect=30, shrink=min(1.0, 25 / min(seq, TALLEST) / rows), pad=0.02
    )
    bar.set_label("scaling")
    return figure


def _name_layers(panel: Any, layers: tuple[str, ...], most: int) -> None:
    every = -(-len(layers) // most)
    places = range(0, len(layers), every)
    names = without_common(layers)
    panel.set_xticks(places)
    panel.set_xticklabels([_drawable(names[at]) for at in places], rotation=90, fontsize=6, parse_math=False)


def _drawable(text: str) -> str:
    """`text` with what the font lacks as U+ numbers."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in text)
