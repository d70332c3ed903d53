"""trackio, which keeps runs in a local database or a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orbit.core.extras import need
from orbit.plugin.trackers.picture import as_picture
from orbit.plugin.trackers.tracker import Tracker

if TYPE_CHECKING:
    from orbit.core.loop import Core


class TrackioHook(Tracker):
    """Log numbers and images to trackio; `trackio show --project <project>` shows them.

    A resumed run goes on in the run that its checkpoint remembers by name; steps that it repeats are there twice.

    Args:
        project, name, config: as `trackio.init` takes them.
        interval: average over so many optimizer steps.
        arguments: other arguments of `trackio.init` (`space_id`, `group`, ...).

    Attributes:
        run: trackio's run while training, else None.
        run_name: its name, once begun or restored.
    """

    def __init__(
        self,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        interval: int = 10,
        **arguments: Any,
    ) -> None:
        super().__init__(interval)
        settings = None if config is None else dict(config)
        self.arguments: dict[str, Any] = {"project": project, "name": name, "config": settings, **arguments}
        self.run: Any = None
        self.run_name: str | None = None

    def begin(self, trainer: Core) -> None:
        need("trackio", "trackio")
        import trackio

        resumed = {} if self.run_name is None else {"name": self.run_name, "resume": "allow"}
        self.run = trackio.init(**(self.arguments | resumed))
        self.run_name = self.run.name

    def write(self, records: dict[str, float], step: int) -> None:
        self.run.log(records, step=step)

    def write_images(self, images: dict[str, Any], step: int) -> None:
        import trackio

        self.run.log(
            {name: trackio.Image(as_picture(name, image)) for name, image in images.items()}, step=step
        )

    def end(self) -> None:
        from trackio import context_vars

        self.run.finish()
        if context_vars.current_run.get() is self.run:
            context_vars.current_run.set(None)  # else it is finished again when Python exits
        self.run = None

    def remember(self) -> dict[str, Any]:
        return {"run_name": self.run_name}

    def recall(self, kept: dict[str, Any]) -> None:
        self.run_name = kept["run_name"]
