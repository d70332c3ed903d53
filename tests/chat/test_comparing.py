"""Answers side by side."""

import io
import re

from orbit.chat.comparing import show_answers


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_side_by_side_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    show_answers({"math": "[b]four[/b] and so on " * 4, "off": "two"}, out)
    lines = re.sub(r"\x1b\[\d*m", "", out.getvalue()).splitlines()
    assert any("math" in line and "off" in line for line in lines)
    assert any("[b]four[/b]" in line and "two" in line for line in lines)
    assert max(map(len, lines)) <= 60
    assert sum(line.count("[b]four[/b]") for line in lines) == 4


def test_one_below_the_other_elsewhere():
    out = io.StringIO()
    show_answers({"math": "four", "off": "two"}, out)
    assert out.getvalue() == "[math]\nfour\n[off]\ntwo\n"
