"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orbit.core.extras import need
from orbit.core.nested import flat
from orbit.plugin.trackers.picture import as_picture
from orbit.plugin.trackers.tracker import Tracker, Written

if TYPE_CHECKING:
    from orbit.core.loop import Core

_SHOWN = ("loss", "epoch/train_loss", "epoch/val_loss")  # the metrics beside the settings in the HPARAMS tab


class Board(Tracker):
    """Write event files for TensorBoard: `tensorboard --logdir <path>`.

    A resumed run hides what was written after its checkpoint (TensorBoard's purge step), so that the curves are those
    of an uninterrupted run; one that begins anew in the same folder hides all of it.

    Args:
        path: folder of the event files; a relative one lies in the trainer's workspace, if it has one.
        interval: average over so many optimizer steps.
        config: the run's settings, shown as text and in the HPARAMS tab; nested names are joined by "/".
    """

    def __init__(
        self, path: Path | str = "board", interval: int = 10, config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(interval)
        self.path = Path(path)
        self.config = dict(config or {})
        self._writer: Any = None
        self._session: tuple[Any, ...] = ()

    def begin(self, trainer: Core) -> None:
        need("board", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # A resumed step is written again up to its checkpoint; where that would lose images, all of it stays.
        there = self.written if self.written.step == trainer.step else Written()
        hidden_from = trainer.step + (there.images > 0)
        self._writer = SummaryWriter(str(trainer.in_workspace(self.path)), purge_step=hidden_from)
        for row in there.rows if there.images == 0 else ():
            self.write(row, trainer.step)
        if self.config:
            rows = [f"| {name} | {value!r} |" for name, value in flat(self.config)]
            self._writer.add_text(
                "config", "\n".join(["| setting | value |", "|---|---|", *rows]), hidden_from
            )
            settings = {
                name: value if isinstance(value, bool | int | float | str) else repr(value)
                for name, value in flat(self.config)
            }
            *begun, ended = hparams(settings, dict.fromkeys(_SHOWN, 0.0))
            for summary in begun:
                self._writer.file_writer.add_summary(summary)
            self._session = (ended,)

    def write(self, records: dict[str, float], step: int) -> None:
        for name, value in records.items():
            self._writer.add_scalar(name, value, step)

    def write_images(self, images: dict[str, Any], step: int) -> None:
        pictures = {name: as_picture(name, image) for name, image in images.items()}
        for name, picture in pictures.items():
            colours = "RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB"
            self._writer.add_image(name, np.asarray(picture.convert(colours)), step, dataformats="HWC")

    def remember(self) -> dict[str, Any]:
        if self._open:
            self._writer.flush()
        return {}

    def end(self) -> None:
        for summary in self._session:
            self._writer.file_writer.add_summary(summary)
        self._session = ()
        self._writer.close()
