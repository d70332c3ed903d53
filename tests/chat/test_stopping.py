"""Stop strings: nothing of one is ever shown, however the text is cut."""

import random

import pytest

from orbit.chat.stopping import StopStrings


def cut_at_first(text, stops):
    """By the definition: the stop string that is complete first ends the text; of two that end there, the longer."""
    for end in range(1, len(text) + 1):
        ends_here = [stop for stop in stops if text[:end].endswith(stop)]
        if ends_here:
            return text[: end - max(map(len, ends_here))], True
    return text, False


def pieces_of(text, random):
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(random.randrange(8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_any_cut_of_any_text_gives_what_the_definition_says():
    draw = random.Random(0)
    ended = 0
    for _ in range(3000):
        stops = ["".join(draw.choices("ab\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        text = "".join(draw.choices("ab\n", k=draw.randint(0, 12)))
        filter = StopStrings(stops)
        shown = "".join(filter.feed(piece) for piece in pieces_of(text, draw)) + filter.flush()
        assert (shown, filter.found) == cut_at_first(text, stops), (text, stops)
        ended += filter.found
    assert 500 < ended < 2900


@pytest.mark.parametrize("text", ["aab", "ababac", "xabab"])
def test_only_what_could_begin_a_stop_string_is_held_back(text):
    stops = ["abac"]
    filter, seen = StopStrings(stops), ""
    for end, letter in enumerate(text, 1):
        seen += filter.feed(letter)
        if filter.found:
            break
        held = text[:end].removeprefix(seen)
        longest = max(n for n in range(end + 1) if any(s.startswith(text[end - n : end]) for s in stops))
        assert len(held) == longest
