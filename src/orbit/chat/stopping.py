"""Where a reply ends: at the first stop string, of which nothing is ever shown.

Text comes in pieces that may end anywhere. What could be the beginning of a stop string is held back until it is
either a stop string or not: the longest end of the text that begins one. The string that is complete first ends the
reply, so the result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Hands on text up to the first stop string.

    Attributes:
        found: was there one? Then nothing more comes out.

    >>> text = StopStrings(["User:"])
    >>> [text.feed(piece) for piece in ("Yes. Us", "ually. U", "ser", ": And")], text.found
    (['Yes. ', 'Usually. ', '', ''], True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = sorted(stop, key=len, reverse=True)  # of two that end here, the longer began first
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        shown = ""
        for letter in text:
            if self.found:
                break
            self._held += letter
            for stop in self._stop:
                if self._held.endswith(stop):
                    self.found = True
                    shown += self._held[: -len(stop)]
                    self._held = ""
                    break
            else:
                keep = self._beginning()
                shown += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, at the text's end."""
        shown, self._held = self._held, ""
        return shown

    def _beginning(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        lengths = range(len(self._held), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stop)), 0)
