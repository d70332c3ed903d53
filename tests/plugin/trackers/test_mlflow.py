"""MLflow's own store in a folder, read back by its client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")

from mlflow import MlflowClient

from orbit.plugin import MLflowHook
from tests import tracked


def uri(folder: Path) -> str:
    return f"file://{folder / 'store'}"


def history(client: Any, run_id: str | None, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


@pytest.mark.parametrize("face", tracked.FACES)
def test_numbers_images_and_settings_are_there(face: str, tmp_path: Path) -> None:
    config = {"lr": 0.1, "model": {"bias": True}, **{f"of many {n}": n for n in range(200)}}
    hook = MLflowHook("mine", "first", config, tracking_uri=uri(tmp_path), tags={"a": "b"}, interval=2)
    trainer = tracked.train(face, tmp_path, [hook], steps=7)
    client = MlflowClient(tracking_uri=uri(tmp_path))
    run = client.get_run(hook.run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["a"]) == ("FINISHED", "first", "b")
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    assert (run.data.params["lr"], run.data.params["model/bias"], len(run.data.params)) == (
        "0.1",
        "True",
        202,
    )
    assert history(client, hook.run_id, "parts/ce") == [(step, step + 0.5) for step in range(7)]
    assert [step for step, _ in history(client, hook.run_id, "loss")] == [2, 4, 6]
    assert history(client, hook.run_id, "epoch/train_loss") == [(7, trainer.metrics["train_loss"])]
    if face == "trainer":
        twice, once = (history(client, hook.run_id, f"losses/{name}") for name in ("twice", "ce"))
        assert twice == [(step, pytest.approx(2 * value)) for step, value in once]
    pictures = sorted((tmp_path / "store").rglob("seen*.png"))
    assert [path.name.split("+")[1:3] for path in pictures] == [["step", str(step)] for step in (0, 2, 4, 6)]
    assert np.array_equal(np.asarray(Image.open(pictures[0])), tracked.PICTURE)


@pytest.mark.parametrize("face", tracked.FACES)
def test_a_resumed_run_goes_on_in_the_same_run(face: str, tmp_path: Path) -> None:
    def hook() -> MLflowHook:
        return MLflowHook(tracking_uri=uri(tmp_path), interval=3)

    client, first, second = MlflowClient(tracking_uri=uri(tmp_path)), hook(), hook()
    with pytest.raises(tracked.Killed):
        tracked.train(face, tmp_path, [first], 8, dies_at=6)
    assert client.get_run(first.run_id).info.status == "FAILED"
    tracked.train(face, tmp_path, [second], 8)
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "FINISHED"
    losses = history(client, first.run_id, "loss")
    assert [step for step, _ in losses] == [3, 6, 6]
    assert losses[1] == losses[2], "the interval of steps 4 to 6 is whole"


def test_a_run_that_is_left_early_says_so(tmp_path: Path) -> None:
    from orbit.engine import Engine
    from tests import tiny

    hook = MLflowHook(tracking_uri=uri(tmp_path))
    engine = Engine(tiny.model(), plugins=[hook], device="cpu")
    for _ in engine.train(tiny.loader()):
        break
    assert MlflowClient(tracking_uri=uri(tmp_path)).get_run(hook.run_id).info.status == "KILLED"


def test_a_run_that_is_not_known_there_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracked.train("trainer", tmp_path, [MLflowHook(tracking_uri=uri(tmp_path / "a"))], 4)
    other = MLflowHook(tracking_uri=uri(tmp_path / "b"))
    tracked.train("trainer", tmp_path, [other], 5)
    assert MlflowClient(tracking_uri=uri(tmp_path / "b")).get_run(other.run_id).info.status == "FINISHED"
    assert any("a new one begins" in record.getMessage() for record in caplog.records)


def test_names_that_it_refuses(tmp_path: Path) -> None:
    class Odd(tracked.Says):
        def on_before_step(self, trainer: Any) -> None:
            trainer.log({"acc@5": 1.0, "größe": 2.0})

    hook = MLflowHook(tracking_uri=uri(tmp_path))
    tracked.train("trainer", tmp_path, [hook, Odd()], 1)
    metrics = MlflowClient(tracking_uri=uri(tmp_path)).get_run(hook.run_id).data.metrics
    assert (metrics["acc_5"], metrics["gr__e"]) == (1.0, 2.0)
