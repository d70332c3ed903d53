from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from orbit.core import Outcome, Plugin
from orbit.engine import Engine
from orbit.plugin import ClassificationReport, ImageFileLoggerHook
from tests import tiny

TARGET = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
GUESS = torch.tensor([0, 0, 1, 1, 0, 2, 2, 2, 1, 2])


class Echo(nn.Module):
    """The batch holds the scores already."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def batches(guess: torch.Tensor = GUESS, target: torch.Tensor = TARGET, size: int = 4) -> list[Any]:
    scores = F.one_hot(guess, 4).float()
    return list(zip(scores.split(size), target.split(size), strict=True))


def evaluated(plugin: ClassificationReport, data: Any, *others: Plugin, criterion: Any = None) -> Engine:
    engine = Engine(
        Echo(), criterion=criterion or nn.CrossEntropyLoss(), plugins=[plugin, *others], device="cpu"
    )
    for _ in engine.eval(data):
        engine.auto_update()
    return engine


def by_hand(guess: torch.Tensor, target: torch.Tensor) -> dict[str, list[float]]:
    """From the definitions."""
    scores: dict[str, list[float]] = {"precision": [], "recall": [], "f1": []}
    for c in range(4):
        tp = int(((guess == c) & (target == c)).sum())
        fp, fn = int(((guess == c) & (target != c)).sum()), int(((guess != c) & (target == c)).sum())
        scores["precision"].append(tp / max(1, tp + fp))
        scores["recall"].append(tp / max(1, tp + fn))
        scores["f1"].append(2 * tp / max(1, 2 * tp + fp + fn))
    return scores


def test_scores_are_those_of_the_definitions() -> None:
    out = io.StringIO()
    plugin = ClassificationReport(labels=["cat", "dog", "cow", "hen"], console=Console(file=out, width=60))
    engine = evaluated(plugin, batches())
    for name, expected in by_hand(GUESS, TARGET).items():
        assert plugin.scores[name].tolist() == pytest.approx(expected)
        assert engine.metrics[f"val_{name}_macro"] == pytest.approx(sum(expected) / 4)
    assert plugin.confusion is not None
    assert plugin.confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 3, 0], [0, 0, 1, 0]]
    lines = out.getvalue().rstrip("\n").splitlines()
    assert "\n".join(lines) == plugin.report
    assert lines[1].split() == ["cat", "0.6667", "0.6667", "0.6667", "3"]
    assert lines[4].split() == ["hen", "0.0000", "0.0000", "0.0000", "1"]
    assert lines[6].split() == ["accuracy", "0.6000", "10"]
    assert engine.metrics["val_acc"] == pytest.approx(0.6)


def test_every_evaluation_begins_anew_and_an_abandoned_one_leaves_nothing() -> None:
    plugin = ClassificationReport(4, verbose=False, image=False)
    engine = evaluated(plugin, batches())
    for _ in engine.eval(batches(TARGET)):
        engine.auto_update()
        break
    for _ in engine.eval(batches(TARGET)):
        engine.auto_update()
    assert engine.metrics["val_f1_macro"] == 1.0
    assert plugin.confusion is not None
    assert plugin.confusion.sum() == 10


def test_an_evaluation_inside_another_keeps_them_apart() -> None:
    plugin = ClassificationReport(4, verbose=False, image=False)
    engine = Engine(Echo(), criterion=nn.CrossEntropyLoss(), plugins=[plugin], device="cpu")
    for _ in engine.eval(batches()):
        engine.auto_update()
        for _ in engine.eval(batches(TARGET)):
            engine.auto_update()
        assert engine.metrics["val_f1_macro"] == 1.0
    assert plugin.scores["f1"].tolist() == pytest.approx(by_hand(GUESS, TARGET)["f1"])


@pytest.mark.parametrize("given", [None, 3])
def test_ignored_targets_do_not_count(given: int | None) -> None:
    """By the criterion's ignore_index, or by the plugin's own; a class that does not occur is not in the mean."""
    target = TARGET.clone()
    target[:2] = 3 if given else -7
    guess = GUESS.clone()
    guess[-1] = 2
    criterion = nn.CrossEntropyLoss(ignore_index=3 if given else -7)
    plugin = ClassificationReport(4, ignore_index=given, verbose=False, image=False)
    engine = evaluated(plugin, batches(guess, target), criterion=criterion)
    assert plugin.confusion is not None
    assert plugin.confusion.sum() == (7 if given else 8)
    counts = target != (3 if given else -7)
    expected = by_hand(guess[counts], target[counts])["f1"]
    assert plugin.scores["f1"].tolist()[:3] == pytest.approx(expected[:3])
    if given:
        assert engine.metrics["val_f1_macro"] == pytest.approx(sum(expected[:3]) / 3)


@pytest.mark.parametrize(
    "shape", [lambda s: s.transpose(1, 2), lambda s: s, lambda s: s.argmax(-1)], ids=["NCT", "NTC", "NT"]
)
def test_token_scores_of_any_layout(shape: Any) -> None:
    scores, target = F.one_hot(GUESS, 4).float().reshape(2, 5, 4), TARGET.reshape(2, 5)
    plugin = ClassificationReport(
        4, collect=lambda trainer: (shape(scores), target), verbose=False, image=False
    )
    engine = Engine(Echo(), plugins=[plugin], device="cpu")
    for _ in engine.eval([torch.zeros(1)]):
        pass
    assert plugin.scores["f1"].tolist() == pytest.approx(by_hand(GUESS, TARGET)["f1"])


def test_a_model_with_logits_and_a_batch_with_labels() -> None:
    class Model(Echo):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            return SimpleNamespace(logits=x * self.weight, loss=F.cross_entropy(x, labels))

    plugin = ClassificationReport(4, verbose=False, image=False)
    engine = Engine(Model(), plugins=[plugin], device="cpu")
    for _ in engine.eval([{"x": x, "labels": y} for x, y in batches()]):
        engine.auto_update()
    assert plugin.scores["f1"].tolist() == pytest.approx(by_hand(GUESS, TARGET)["f1"])


def test_under_base_trainer_and_padding_does_not_count() -> None:
    class Trainer(tiny.Trainer):
        def forward(self, input: Any) -> Any:
            self.output, self.target = input
            return F.cross_entropy(*input), {}

    plugin = ClassificationReport(4, verbose=False, image=False)
    trainer = Trainer(plugins=[plugin])
    for index, _ in enumerate(trainer.eval(batches(size=5))):
        trainer.is_padding = index == 1
        trainer.step_on(Outcome(trainer.forward(trainer.batch)[0]))
    assert plugin.confusion is not None
    assert plugin.confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_without_an_output_the_error_says_how_to_give_one() -> None:
    plugin = ClassificationReport(3, image=False)
    trainer = tiny.Trainer(plugins=[plugin])
    with pytest.raises(ValueError, match=r"Trainer has no tensor as its output .* collect="):
        for _ in trainer.eval(tiny.loader()):
            pass


def test_classes_beyond_and_shapes_that_do_not_fit_are_errors() -> None:
    plugin = ClassificationReport(3, image=False, collect=lambda trainer: (GUESS, TARGET))
    with pytest.raises(ValueError, match="1 targets or predictions are not among the 3 classes 0 to 2"):
        for _ in Engine(Echo(), plugins=[plugin], device="cpu").eval([torch.zeros(1)]):
            pass
    with pytest.raises(ValueError, match=r"predictions \(4, 4\) .* do not fit targets \(4,\) and 3 classes"):
        evaluated(ClassificationReport(3, image=False), batches())


def test_the_picture_goes_to_the_image_loggers(tmp_path: Path) -> None:
    plugin = ClassificationReport(4, verbose=False)
    evaluated(plugin, batches(), ImageFileLoggerHook(path=tmp_path))
    with Image.open(tmp_path / "step_0" / "confusion_matrix.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) >= 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # it is no blank page


@pytest.mark.parametrize("options", [{}, {"num_classes": 1}, {"num_classes": 2, "labels": ["a", "b"]}])
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ClassificationReport"):
        ClassificationReport(**options)


def test_a_language_model_is_judged_by_the_next_token() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=4, **small))
    ids = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids == 3, -100)
    plugin = ClassificationReport(4, image=False, verbose=False)
    engine = Engine(model, plugins=[plugin], device="cpu")
    for _ in engine.eval([transformers.BatchEncoding({"input_ids": ids, "labels": labels})]):
        engine.auto_update()
    with torch.no_grad():
        guess = model.eval()(ids).logits.argmax(-1)[:, :-1].flatten()
    wanted = labels[:, 1:].flatten()
    expected = torch.zeros(4, 4, dtype=torch.long)
    for target, prediction in zip(wanted.tolist(), guess.tolist(), strict=True):
        if target >= 0:
            expected[target, prediction] += 1
    assert plugin.confusion is not None
    assert plugin.confusion.tolist() == expected.tolist()


def test_logits_in_a_dict_of_the_models_own() -> None:
    class Judge(Echo):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:  # type: ignore[override]
            return {"loss": F.cross_entropy(x * self.weight, labels), "logits": x}

    plugin = ClassificationReport(4, image=False, verbose=False)
    engine = Engine(Judge(), plugins=[plugin], device="cpu")
    for _ in engine.eval([{"x": x, "labels": y} for x, y in batches()]):
        engine.auto_update()
    assert plugin.scores["f1"].tolist() == pytest.approx(by_hand(GUESS, TARGET)["f1"])
