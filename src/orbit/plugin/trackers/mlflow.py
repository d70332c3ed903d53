"""MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orbit.core.extras import need
from orbit.core.nested import flat
from orbit.plugin.trackers.picture import as_picture
from orbit.plugin.trackers.tracker import Tracker

if TYPE_CHECKING:
    from orbit.core.loop import Core

_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_REFUSED = re.compile(r"[^\w\-. /:]", re.ASCII)  # in the name of a metric or parameter


class MLflowHook(Tracker):
    """Log numbers and images to an MLflow server, database or folder.

    A resumed run goes on in the run that its checkpoint remembers, or says that MLflow does not know that and begins a
    new one; metrics of steps that it repeats are there twice. Characters that MLflow refuses in a name become "_".

    Args:
        experiment_name: of an experiment, which is made if there is none.
        run_name: shown in its list; None lets MLflow choose one.
        config: the run's settings, as parameters; nested names are joined by "/".
        tracking_uri: where the runs are kept; None means as the environment says.
        tags: of the run.
        interval: average over so many optimizer steps.

    Attributes:
        run_id: MLflow's id of the run, once begun or restored.
    """

    def __init__(
        self,
        experiment_name: str = "Default",
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        interval: int = 10,
    ) -> None:
        super().__init__(interval)
        self.experiment_name, self.run_name = experiment_name, run_name
        self.config, self.tracking_uri, self.tags = dict(config or {}), tracking_uri, dict(tags or {})
        self.run_id: str | None = None
        self._client: Any = None

    def begin(self, trainer: Core) -> None:
        need("mlflow", "mlflow")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient(tracking_uri=self.tracking_uri)
        if self.run_id is not None and self._known():
            client.update_run(self.run_id, status="RUNNING")
            return
        if self.run_id is not None:
            trainer.logger.warning(
                "MLflow has no run %s, which the checkpoint remembers: a new one begins", self.run_id
            )
        found = client.get_experiment_by_name(self.experiment_name)
        experiment = client.create_experiment(self.experiment_name) if found is None else found.experiment_id
        self.run_id = client.create_run(experiment, run_name=self.run_name, tags=self.tags).info.run_id
        client.log_batch(self.run_id, params=[Param(_name(n), str(value)) for n, value in flat(self.config)])

    def _known(self) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def write(self, records: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(_name(name), value, now, step) for name, value in records.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def write_images(self, images: dict[str, Any], step: int) -> None:
        pictures = {name: as_picture(name, image) for name, image in images.items()}
        for name, picture in pictures.items():
            self._client.log_image(self.run_id, picture, key=_name(name), step=step)

    def end(self) -> None:
        self._client.set_terminated(self.run_id, _STATUS[self.status])
        self._client = None

    def remember(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def recall(self, kept: dict[str, Any]) -> None:
        self.run_id = kept["run_id"]


def _name(name: str) -> str:
    return _REFUSED.sub("_", name)
