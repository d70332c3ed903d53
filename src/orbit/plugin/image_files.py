"""Images that `trainer.log_images` is given, as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.nested import flat
from orbit.plugin.logs import check_interval
from orbit.plugin.trackers.picture import as_picture

if TYPE_CHECKING:
    from orbit.core.loop import Core


class ImageFileLoggerHook(Plugin):
    """Save images as `<path>/step_<step>/<name>.png`; names of nested records are folders below that. Only the main
    process writes.

    An image is a PIL image, an array (height, width) or (height, width, 1, 3 or 4), or a tensor (height, width) or
    (1, 3 or 4, height, width); numbers are bytes, or floats from 0 to 1, beyond which they are clipped.

    Args:
        interval: only calls at steps that are multiples of this are saved.
        path: folder; a relative one lies in the trainer's workspace, if it has one.
        max_images: of one call; the rest is left out, which is said once.

    Raises:
        ValueError: a number outside its range; at a call, a name that leads out of the folder, or what is no image.
    """

    def __init__(self, interval: int = 100, path: Path | str = "images", max_images: int = 8) -> None:
        self.interval = check_interval("ImageFileLoggerHook", interval)
        if max_images < 1:
            raise ValueError(f"ImageFileLoggerHook(max_images={max_images}): it must be >= 1")
        self.path, self.max_images = Path(path), max_images
        self._said = False

    def folder(self, trainer: Core) -> Path:
        """Where this hook's images lie."""
        return trainer.in_workspace(self.path)

    def on_log_images(self, trainer: Core, records: dict[str, Any], dry_run: bool) -> None:
        if dry_run or trainer.step % self.interval or not runtime.is_main_process():
            return
        images = list(flat(records))
        if len(images) > self.max_images and not self._said:
            self._said = True
            trainer.logger.warning(
                "%d images were logged at step %d and ImageFileLoggerHook saves the first %d of a call",
                len(images),
                trainer.step,
                self.max_images,
            )
        folder = self.folder(trainer) / f"step_{trainer.step}"
        pictures = [
            (_place(folder, name), as_picture(name, image)) for name, image in images[: self.max_images]
        ]
        for path, picture in pictures:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


def _place(folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name!r}: its name leads out of {folder}")
    return path
