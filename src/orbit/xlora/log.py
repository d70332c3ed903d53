"""What a mixture remembers of its predictions: the latest one, and a log of all where asked."""

from __future__ import annotations

from torch import Tensor


class ScalingsLog:
    """Predictions (batch, seq, layers, experts), detached.

    Attributes:
        latest: of the last forward, or None.
        entries: of every forward since logging began.
        enabled: is every forward logged?
        to_print: how many more are printed.
    """

    def __init__(self) -> None:
        self.latest: Tensor | None = None
        self.entries: list[Tensor] = []
        self.enabled = False
        self.to_print = 0

    def note(self, prediction: Tensor) -> None:
        """A forward has predicted this."""
        self.latest = prediction.detach()
        if self.enabled:
            self.entries.append(self.latest)
        if self.to_print:
            self.to_print -= 1
            print(f"scalings {tuple(prediction.shape)}: {self.latest}")
