"""Pictures and pages of scalings: what they show, and that no token breaks them."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from orbit.core.extras import MissingExtraError
from orbit.xlora import Scalings, XLoRAError
from orbit.xlora.seeing import picture
from orbit.xlora.seeing.names import shown, without_common
from orbit.xlora.seeing.page import page

HOSTILE = (
    " the",
    "\n",
    "$x_1$",
    "$",
    "<b>",
    "</script><script>alert(1)</script>",
    "<!--",
    "&amp;",
    "\U0001f600",
    "你",
)
HOSTILE += ('"', "\\", "\t", "\x07", "\u2028", "", "a" * 80, "%DATA%", "{}")


def scalings(tokens: tuple[str, ...] = HOSTILE, layers: int = 6, experts: int = 3) -> Scalings:
    values = torch.rand(len(tokens), layers, experts, generator=torch.Generator().manual_seed(0))
    names = tuple(f"model.layers.{k}.self_attn.q_proj" for k in range(layers))
    return Scalings(values.softmax(-1), ("$law$", "<art>", "chat\n", "e4", "e5")[:experts], names, tokens)


class Reader(HTMLParser):
    """The tags and the scripts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.opened and self.opened[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def test_a_page_holds_every_value_and_name_and_needs_nothing_else(tmp_path: Path) -> None:
    s = scalings()
    written = s.plot(tmp_path / "new" / "heat.html").read_text("utf-8")
    assert written == page(s)
    reader = Reader()
    reader.feed(written)
    assert [tag for tag, _ in reader.opened].count("script") == 1
    assert not any({"src", "href"} & attributes.keys() for _, attributes in reader.opened)
    assert "http" not in written
    [script] = reader.scripts
    found = re.search(r"^const data = (.*);$", script, re.MULTILINE)
    assert found is not None
    data = json.loads(found[1])
    assert (tuple(data["experts"]), tuple(data["layers"]), tuple(data["tokens"])) == (
        s.experts,
        s.layers,
        s.tokens,
    )
    values = torch.tensor(data["values"]).view(s.values.shape)
    assert torch.allclose(values, s.values, atol=5.1e-5)
    assert data["low"] == 0.0
    assert data["high"] == pytest.approx(float(s.values.max()))


def test_a_page_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert scalings().plot(str(tmp_path / "heat.htm")).stat().st_size > 2000
    with pytest.raises(MissingExtraError, match=r"orbit-torch\[plot\]"):
        scalings().plot(tmp_path / "heat.png")


@pytest.mark.parametrize("suffix", ["png", "svg", "PDF"])
def test_no_token_breaks_a_picture(tmp_path: Path, suffix: str) -> None:
    path = scalings().plot(tmp_path / "new" / f"heat.{suffix}")
    assert path.stat().st_size > 5000


def test_a_picture_has_a_panel_an_expert_with_the_values_on_one_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = scalings()
    figure = picture.draw(s)
    panels, [bar] = figure.axes[:3], figure.axes[3:]
    for k, panel in enumerate(panels):
        [image] = panel.get_images()
        assert np.array_equal(image.get_array(), s.values[:, :, k].numpy())
        assert image.get_clim() == (0.0, pytest.approx(float(s.values.max())))
        assert panel.get_title().endswith(f"mean {s.values[:, :, k].mean():.2f}")
    assert panels[0].get_title().startswith("$law$\n")
    assert [label.get_text() for label in panels[1].get_xticklabels()][:2] == [
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
    ]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels[:5] == ["·the", "↵", "$x_1$", "$", "<b>"]
    assert labels[9] == "U+4F60"  # matplotlib's font has no Chinese
    assert not any(label.get_parse_math() for label in panels[0].get_yticklabels())
    assert bar.get_ylabel() == "scaling"


def test_many_experts_stand_in_rows_of_five() -> None:
    values = torch.softmax(torch.randn(4, 3, 12), -1)
    names = tuple(f"e{k}" for k in range(12))
    figure = picture.draw(Scalings(values, names, ("a", "b", "c"), ("$x_1$", "$", "<", "")))
    figure.draw_without_rendering()
    *panels, _ = figure.axes
    assert [panel.get_title().partition("\n")[0] for panel in panels] == list(names)
    left, bottom = zip(
        *((round(p.get_position().x0, 2), round(p.get_position().y0, 2)) for p in panels), strict=True
    )
    assert (len(set(left)), len(set(bottom))) == (5, 3)
    for k, panel in enumerate(panels):
        seen = [label.get_text() for label in panel.get_yticklabels() if label.get_visible()]
        assert seen == (["$x_1$", "$", "<", "∅"] if k % 5 == 0 else [])
        assert k % 5 or not any(label.get_parse_math() for label in panel.get_yticklabels())


def test_a_long_text_names_every_third_token_with_its_place() -> None:
    s = scalings(tuple(f"t{k}" for k in range(450)), layers=2, experts=2)
    figure = picture.draw(s)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:3] == ["t0  0", "t3  3", "t6  6"]
    assert len(labels) == 150
    assert figure.get_size_inches()[1] < 45
    assert [int(tick) for tick in figure.axes[0].get_yticks()[:3]] == [0, 3, 6]


def test_many_layers_leave_room_for_their_names() -> None:
    figure = picture.draw(scalings(("a", "b"), layers=210, experts=1))
    names = figure.axes[0].get_xticklabels()
    assert 20 < len(names) < 35


def test_scalings_below_zero_are_on_the_scale() -> None:
    s = Scalings(torch.tensor([[[-2.0, 1.0]]]), ("a", "b"), ("0",), ("x",))
    assert picture.draw(s).axes[0].get_images()[0].get_clim() == (-2.0, 1.0)
    assert '"low":-2.0,"high":1.0' in page(s)
    rest = Scalings(torch.zeros(1, 1, 1), ("a",), ("0",), ("x",))  # no step between 0 and 0
    low, high = picture.draw(rest).axes[0].get_images()[0].get_clim()
    assert low == 0.0 < high


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(XLoRAError, match=r"heat\.docx: a picture of scalings is \.html or one of \[.*'png'"):
        scalings().plot(tmp_path / "heat.docx")
    assert list(tmp_path.iterdir()) == []


def test_what_names_look_like() -> None:
    assert [shown(token) for token in ("\u2028", "a" * 30, "\t\r")] == ["U+2028", "a" * 23 + "…", "→←"]
    assert without_common(["a.b.q", "a.b.k"]) == ["q", "k"]
    assert without_common(["a.b", "a.b.c"]) == ["b", "b.c"]
    assert without_common(["a.q"]) == ["q"]
