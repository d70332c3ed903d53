"""Messages over one line or several."""

import pytest

from orbit.chat.reading import Typed, from_lines, from_terminal, read_message


def messages(*lines):
    ask, found = from_lines(lines), []
    while True:
        try:
            found.append(read_message(ask))
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        (["hello\n", "  mali "], [("hello", False), ("mali", False)]),
        (["", "  "], [("", False), ("", False)]),
        (["one \\", "two\\", "three", "four"], [("one \ntwo\nthree", False), ("four", False)]),
        (["one \\"], []),
        (["/reset", "/set a b"], [("/reset", True), ("/set a b", True)]),
        (
            ['"""', "def f(x):", "    return x", "", '"""', "then"],
            [("def f(x):\n    return x", False), ("then", False)],
        ),
        (['"""/etc/passwd"""'], [("/etc/passwd", False)]),
        (['"""one', 'two"""'], [("one\ntwo", False)]),
        (['"""', "    indented", '"""  '], [("    indented", False)]),
        (['"""', "never closed"], []),
        (['say """ no'], [('say """ no', False)]),
    ],
)
def test_messages(lines, wanted):
    assert messages(*lines) == [Typed(text, is_command) for text, is_command in wanted]


def test_the_terminal_is_asked_with_a_prompt_that_shows_what_goes_on(monkeypatch):
    prompts, typed = [], iter(["one \\", "two"])
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(typed))
    assert read_message(from_terminal()).text == "one \ntwo"
    assert prompts == ["> ", "... "]
