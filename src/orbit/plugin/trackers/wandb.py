"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orbit.core.extras import need
from orbit.plugin.trackers.picture import as_picture
from orbit.plugin.trackers.tracker import Tracker

if TYPE_CHECKING:
    from orbit.core.loop import Core

STEP = "trainer/step"


class WandbHook(Tracker):
    """Log numbers and images to Weights & Biases.

    W&B counts its own rows and refuses to go back; so every row carries `trainer/step`, which is the x axis of all
    charts. A resumed run goes on in the run that its checkpoint remembers; steps that it repeats are there twice, one
    over the other. A run that raised is marked as failed.

    Args:
        project, name, config: as `wandb.init` takes them.
        interval: average over so many optimizer steps.
        arguments: other arguments of `wandb.init` (`entity`, `tags`, `mode="offline"`, ...). Unless they are given,
            `id` is the remembered one and `resume` "allow" where a run is resumed, `dir` is the workspace if there is
            one, `reinit` is "create_new", so that the run is this hook's own, and `settings` are silent.

    Attributes:
        run: W&B's run while training, else None.
        run_id: its id, once begun or restored.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        interval: int = 10,
        **arguments: Any,
    ) -> None:
        super().__init__(interval)
        self.arguments: dict[str, Any] = {"project": project, "name": name, "config": config, **arguments}
        self.run: Any = None
        self.run_id: str | None = None

    def begin(self, trainer: Core) -> None:
        need("wandb", "wandb")
        import wandb

        workspace = getattr(trainer, "workspace", None)
        ours: dict[str, Any] = {"reinit": "create_new", "settings": wandb.Settings(silent=True)}
        if workspace is not None:
            workspace.mkdir(parents=True, exist_ok=True)
            ours["dir"] = str(workspace)
        if self.run_id is not None:
            ours |= {"id": self.run_id, "resume": "allow"}
        self.run = wandb.init(**(ours | self.arguments))
        self.run_id = self.run.id
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def write(self, records: dict[str, float], step: int) -> None:
        self.run.log({**records, STEP: step})

    def write_images(self, images: dict[str, Any], step: int) -> None:
        import wandb

        pictures = {name: wandb.Image(as_picture(name, image)) for name, image in images.items()}
        self.run.log({**pictures, STEP: step})

    def end(self) -> None:
        self.run.finish(exit_code=int(self.status == "failed"))
        self.run = None

    def remember(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def recall(self, kept: dict[str, Any]) -> None:
        self.run_id = kept["run_id"]
