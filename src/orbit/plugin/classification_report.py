"""Which classes a classifier mistakes for which: precision, recall and F1 of each, and the picture of its confusions.

    precision = tp/(tp + fp)      recall = tp/(tp + fn)      F1 = 2·tp/(2·tp + fp + fn)

of every class, counted by torchmetrics while `eval()` runs, on the device and over all ranks. The macro mean is over
the classes that occur, as target or as prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.extras import need

if TYPE_CHECKING:
    from orbit.core.loop import Core

_SCORES = ("precision", "recall", "f1")
_MOST_WRITTEN = 30  # classes; beyond, numbers would not fit into the picture's cells


class ClassificationReport(Plugin):
    """Report on every class at the end of each `eval()`, and add the macro means to `trainer.metrics`, as
    `val_precision_macro`, `val_recall_macro` and `val_f1_macro`.

    Predictions are scores (N, C, ...), scores (N, ..., C), or class numbers (N, ...); targets class numbers (N, ...).

    Args:
        num_classes: C, at least 2. Or give `labels`.
        labels: the classes' names, in the order of their numbers.
        ignore_index: a target that does not count; None takes the criterion's, else -100.
        collect: `collect(trainer) -> (predictions, targets)` after the loop's body is done with a batch. By default
            `trainer.output` (or its logits) and `trainer.target` (or the batch's "labels", one ahead of the scores
            for a causal language model of transformers). `Engine` has them; under `BaseTrainer`, set `self.output` and
            `self.target` in `forward`, or give this.
        image: draw the confusions for `trainer.log_images`, as "confusion_matrix".
        verbose: print the report.
        console: where to print; only rank 0 does.

    Attributes:
        report: the last report as text, empty before the first.
        confusion: of the last evaluation, (C, C) counts on the CPU: row the target, column the prediction.
        scores: of the last evaluation: {"precision": (C,), "recall": (C,), "f1": (C,)} on the CPU.

    Raises:
        MissingExtraError: torchmetrics (or matplotlib, for the picture) is not installed.
        ValueError: not one of `num_classes` and `labels`; in an evaluation, nothing to collect, shapes that do not
            fit, or classes beyond C.
    """

    priority = Plugin.METER

    def __init__(
        self,
        num_classes: int | None = None,
        labels: Sequence[str] | None = None,
        ignore_index: int | None = None,
        collect: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        image: bool = True,
        verbose: bool = True,
        console: Console | None = None,
    ) -> None:
        if (num_classes is None) == (labels is None):
            raise ValueError("ClassificationReport: give num_classes= or labels=, one of them")
        number = len(labels) if labels is not None else num_classes
        if not isinstance(number, int) or number < 2:
            raise ValueError(
                f"ClassificationReport(num_classes={number!r}): there must be at least 2 classes"
            )
        need("metrics", "torchmetrics", *(["matplotlib"] if image else []))
        self.num_classes = number
        self.labels = [str(label) for label in (range(number) if labels is None else labels)]
        self.ignore_index, self.collect = ignore_index, _output_and_target if collect is None else collect
        self.image, self.verbose, self.console = image, verbose, console
        self.report = ""
        self.confusion: Tensor | None = None
        self.scores: dict[str, Tensor] = {}
        self._open: list[
            tuple[Any, Tensor]
        ] = []  # of every eval() that runs: metrics, and how many are no class

    def on_before_eval(self, trainer: Core) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import (
            MulticlassConfusionMatrix,
            MulticlassF1Score,
            MulticlassPrecision,
            MulticlassRecall,
        )

        # Their own checks read values back in every batch; ours are made once, at the end.
        how = {
            "num_classes": self.num_classes,
            "ignore_index": self._ignored(trainer),
            "validate_args": False,
        }
        scores = {"precision": MulticlassPrecision, "recall": MulticlassRecall, "f1": MulticlassF1Score}
        parts = {"confusion": MulticlassConfusionMatrix(**how)}
        for name, kind in scores.items():
            parts[name] = kind(average="none", **how)
            parts[f"{name}_macro"] = kind(average="macro", **how)
        beyond = torch.zeros((), dtype=torch.long, device=trainer.device)
        self._open.append((MetricCollection(parts).to(trainer.device), beyond))

    def on_after_eval_batch(self, trainer: Core) -> None:
        predictions, target = self.collect(trainer)
        predictions = self._classes(predictions.detach(), target).to(trainer.device)
        target = target.to(trainer.device)
        ignored = torch.full_like(target, self._ignored(trainer))
        counts = (target != ignored) & (not trainer.is_padding)
        known = (target >= 0) & (target < self.num_classes)
        known &= (predictions >= 0) & (predictions < self.num_classes)
        metrics, beyond = self._open[-1]
        beyond += (counts & ~known).sum()
        metrics.update(
            predictions.clamp(0, self.num_classes - 1), torch.where(counts & known, target, ignored)
        )

    def on_after_eval(self, trainer: Core) -> None:
        metrics, beyond = self._open[-1]
        found = {name: value.cpu() for name, value in metrics.compute().items()}
        if beyond:
            raise ValueError(
                f"ClassificationReport: {int(beyond)} targets or predictions are not among the "
                f"{self.num_classes} classes 0 to {self.num_classes - 1}; set num_classes, or ignore_index for targets "
                "that do not count"
            )
        self.confusion, self.scores = found["confusion"], {name: found[name] for name in _SCORES}
        macro = {name: float(found[f"{name}_macro"]) for name in _SCORES}
        for name, value in macro.items():
            trainer.metrics[f"val_{name}_macro"] = value
        self.report = self._text(self.confusion, macro)
        main = runtime.is_main_process()
        if self.verbose and main:
            console = self.console or getattr(trainer, "console", None) or Console()
            console.print(self.report, highlight=False, markup=False, soft_wrap=True)
        if self.image:
            trainer.log_images({"confusion_matrix": self.picture()}, dry_run=not main)

    def on_leave_eval(self, trainer: Core) -> None:
        if self._open:
            self._open.pop()

    def picture(self) -> Any:
        """The confusions of the last evaluation as a PIL image: counts, coloured by their share of the target's row."""
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image

        assert self.confusion is not None
        counts, number = self.confusion.numpy(), self.num_classes
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        side = max(4.0, 0.45 * number)
        figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="prediction", ylabel="target")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(number), self.labels, rotation=45, ha="right")
        axes.set_yticks(range(number), self.labels)
        for row, column in np.ndindex(*counts.shape) if number <= _MOST_WRITTEN else ():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())

    def _ignored(self, trainer: Core) -> int:
        if self.ignore_index is not None:
            return self.ignore_index
        own = getattr(getattr(trainer, "criterion", None), "ignore_index", None)
        return own if isinstance(own, int) else -100

    def _classes(self, predictions: Tensor, target: Tensor) -> Tensor:
        """Class numbers of the shape of `target`."""
        shape, wanted = tuple(predictions.shape), tuple(target.shape)
        if not predictions.is_floating_point() and shape == wanted:
            return predictions
        if len(shape) == len(wanted) + 1:
            if shape[:1] + shape[2:] == wanted and shape[1] == self.num_classes:
                return predictions.argmax(1)
            if shape[:-1] == wanted and shape[-1] == self.num_classes:
                return predictions.argmax(-1)
        raise ValueError(
            f"ClassificationReport: predictions {shape} ({predictions.dtype}) do not fit targets {wanted} and "
            f"{self.num_classes} classes: give scores (N, C, ...) or (N, ..., C), or class numbers (N, ...)"
        )

    def _text(self, confusion: Tensor, macro: dict[str, float]) -> str:
        support = confusion.sum(1).tolist()
        width = max(9, *map(len, self.labels))
        rows = [f"{'':>{width}}  precision  recall      f1  support"]
        for number, label in enumerate(self.labels):
            p, r, f1 = (self.scores[name][number].item() for name in _SCORES)
            rows.append(f"{label:>{width}}  {p:9.4f}  {r:6.4f}  {f1:6.4f}  {support[number]:7d}")
        p, r, f1 = (macro[name] for name in _SCORES)
        rows.append(f"{'macro':>{width}}  {p:9.4f}  {r:6.4f}  {f1:6.4f}  {sum(support):7d}")
        right = confusion.diagonal().sum().item()
        rows.append(
            f"{'accuracy':>{width}}  {'':9}  {'':6}  {right / max(1, sum(support)):6.4f}  {sum(support):7d}"
        )
        return "\n".join(rows)


def _output_and_target(trainer: Any) -> tuple[Tensor, Tensor]:
    output, target = getattr(trainer, "output", None), getattr(trainer, "target", None)
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if target is None and isinstance(trainer.batch, Mapping):
        target = trainer.batch.get("labels")
    if isinstance(logits, Tensor):
        output = logits
        if isinstance(target, Tensor) and (logits.ndim, target.ndim) == (3, 2):  # tokens: classes are last
            if _predicts_the_next(trainer.unwrapped_model):
                output, target = output[:, :-1], target[:, 1:]
            output = output.movedim(-1, 1)
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        what = "output" if not isinstance(output, Tensor) else "target"
        raise ValueError(
            f"ClassificationReport: {type(trainer).__name__} has no tensor as its {what} after this batch; set "
            f"trainer.{what} where you compute the loss, or give collect=lambda trainer: (predictions, targets)"
        )
    return output, target


def _predicts_the_next(model: Any) -> bool:
    """A causal language model of transformers: its scores at one place are for the label at the next."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encodes and getattr(model, "loss_type", "none of transformers") in (None, "ForCausalLM")
