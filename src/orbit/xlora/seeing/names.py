"""Names as pictures show them: tokens with their white space seen, layers without what all share."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 24
_SEEN = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})


def shown(text: str) -> str:
    """A text on one line: spaces, line breaks and tabs as marks, other control characters by number, and cut.

    >>> shown(" the\\n"), shown("\\x07"), shown("")
    ('·the↵', 'U+0007', '∅')
    """
    marked = text.translate(_SEEN)
    marked = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in marked)
    return (marked if len(marked) <= LONGEST else marked[: LONGEST - 1] + "…") or "∅"


def without_common(names: Sequence[str]) -> list[str]:
    """Dotted names less the segments that all begin with; each keeps at least its last.

    >>> without_common(["model.layers.0.q_proj", "model.layers.1.q_proj"])
    ['0.q_proj', '1.q_proj']
    """
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return [".".join(p[same:]) for p in parts]
