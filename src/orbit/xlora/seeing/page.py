"""Scalings as a page of HTML that is complete in itself: no network, no library, no matplotlib.

The values are written into the page, rounded to four digits, and drawn by its own script onto one canvas an expert,
so that a text of some thousand tokens still opens at once. Tokens stand on the left and stay there when
the panels scroll; the line at the top says what the mouse is on. Every string reaches the page as JSON without a "<",
and the document as text, so that no token can be taken for markup.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orbit.xlora.seeing.names import shown

if TYPE_CHECKING:
    from orbit.xlora.seeing.scalings import Scalings

# viridis at even distances, as in the pictures that matplotlib draws
COLOURS = "#440154 #482475 #414487 #355f8d #2a788e #21918c #22a884 #44bf70 #7ad151 #bddf26 #fde725"


def write(scalings: Scalings, path: str | os.PathLike[str]) -> None:
    """Write `scalings` as a page, and the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(scalings), "utf-8")


def page(scalings: Scalings) -> str:
    """The page's text."""
    values = scalings.values
    data = {
        "experts": scalings.experts,
        "layers": scalings.layers,
        "tokens": scalings.tokens,
        "shown": [shown(token) for token in scalings.tokens],
        "low": min(0.0, float(values.min())),
        "high": max(float(values.max()), 1e-6),
        "values": [
            [round(x, 4) for x in row] for row in values.flatten(1).tolist()
        ],  # (seq, layers · experts)
        "colours": COLOURS.split(),
    }
    written = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.replace("%DATA%", written)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Scalings</title>
<style>
  body { font: 13px/1.4 system-ui, sans-serif; margin: 0; color: #222; background: #fff }
  header { position: sticky; top: 0; left: 0; z-index: 2; background: #fff; padding: 8px 12px }
  #bar { display: inline-block; width: 160px; height: 10px; vertical-align: middle; margin: 0 6px }
  #at { min-height: 3em; white-space: pre-wrap; font-variant-numeric: tabular-nums }
  #all { display: flex; gap: 12px; padding: 0 12px 12px 0; width: max-content }
  #tokens { position: sticky; left: 0; z-index: 1; background: #fff; padding: 26px 6px 0 12px; text-align: right }
  #tokens div { height: 16px; line-height: 16px; font: 12px/16px ui-monospace, monospace; white-space: nowrap }
  .here { background: #ffe08a }
  h2 { font-size: 13px; height: 20px; line-height: 20px; margin: 3px 0; white-space: nowrap }
  canvas { display: block; image-rendering: pixelated; cursor: crosshair }
</style>
<header>
  scaling <span id="low"></span><span id="bar"></span><span id="high"></span>
  &nbsp; tokens downwards, layers to the right
  <div id="at">move the mouse over a panel</div>
</header>
<main id="all"><div id="tokens"></div></main>
<script>
const data = %DATA%;
const n = data.experts.length, L = data.layers.length, T = data.tokens.length, ROW = 16;
const column = Math.max(2, Math.min(24, Math.floor(420 / L)));
const rgb = data.colours.map(c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16)));
const span = data.high - data.low;
const value = (t, l, k) => data.values[t][l * n + k];
const byId = id => document.getElementById(id);
function colour(x) {
  const at = Math.max(0, Math.min(1, (x - data.low) / span)) * (rgb.length - 1);
  const i = Math.min(rgb.length - 2, Math.floor(at));
  return rgb[i].map((c, j) => Math.round(c + (at - i) * (rgb[i + 1][j] - c)));
}
byId("low").textContent = data.low.toPrecision(3);
byId("high").textContent = data.high.toPrecision(3);
byId("bar").style.background = `linear-gradient(to right, ${data.colours.join(",")})`;
const rows = data.shown.map((text, t) => {
  const row = document.createElement("div");
  row.textContent = text;
  row.title = `token ${t}`;
  byId("tokens").append(row);
  return row;
});
let here = null;
data.experts.forEach((expert, k) => {
  const panel = document.createElement("section"), title = document.createElement("h2");
  const canvas = document.createElement("canvas");
  let sum = 0;
  canvas.width = L; canvas.height = T;
  canvas.style.width = `${L * column}px`; canvas.style.height = `${T * ROW}px`;
  const context = canvas.getContext("2d"), image = context.createImageData(L, T);
  for (let t = 0; t < T; t++) for (let l = 0; l < L; l++) {
    sum += value(t, l, k);
    image.data.set([...colour(value(t, l, k)), 255], 4 * (t * L + l));
  }
  context.putImageData(image, 0, 0);
  title.textContent = `${expert} (mean ${(sum / T / L).toFixed(3)})`;
  canvas.onmousemove = event => {
    const l = Math.min(L - 1, Math.floor(event.offsetX / column)), t = Math.min(T - 1, Math.floor(event.offsetY / ROW));
    if (here) here.className = "";
    here = rows[t]; here.className = "here";
    const all = data.experts.map((name, i) => `${name} ${value(t, l, i).toFixed(4)}`).join("    ");
    byId("at").textContent = `token ${t} ${JSON.stringify(data.tokens[t])}, layer ${data.layers[l]}\\n${all}`;
  };
  panel.append(title, canvas);
  byId("all").append(panel);
});
</script>
</html>
"""
