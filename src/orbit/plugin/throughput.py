"""How fast the run is, and how much of what the hardware can do.

    MFU = F/(t·P)      F model FLOPs of the steps timed, t their seconds, P the device's peak in FLOP/s

F is counted, not estimated: `torch.utils.flop_counter` watches the forward and the backward of one real micro-batch.
What activation checkpointing computes a second time is not counted (PaLM, Chowdhery et al. 2022, appendix B). Other
micro-batches of about the same row length are scaled by their number of elements; another length is counted anew,
since attention grows faster than the length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orbit.core.events import Plugin
from orbit.core.measuring.peak import peak_flops
from orbit.core.nested import first_tensor
from orbit.plugin.logs import check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Throughput(Plugin):
    """Measure speed over every `interval` optimizer steps, and put it into `step_info` for whatever logs:

        samples_per_second     rows
        tokens_per_second      where the batch says what its tokens are
        tflops                 model TFLOP/s
        mfu                    0 to 1, where the peak is known

    All are of this process (device). The first step of a run, slow by nature, and evaluations are not timed.

    Args:
        interval: steps, >= 1. The device is waited for once in so many.
        tokens: `tokens(batch) -> number or 0-d tensor`; None counts `attention_mask`, else the elements of `input_ids`.
        flops: model FLOPs of a micro-batch, forward and backward, if they shall not be counted: `flops(batch)`. Needed
            for compiled models, which cannot be watched. False leaves them out.
        peak: FLOP/s of the device, where it is not known or known better.

    Attributes:
        figures: the newest values.
    """

    priority = Plugin.METER

    def __init__(
        self,
        interval: int = 10,
        tokens: Callable[[Any], int | Tensor | None] | None = None,
        flops: Callable[[Any], float] | bool = True,
        peak: float | None = None,
    ) -> None:
        self.interval = check_interval("Throughput", interval)
        if peak is not None and not 0 < peak < math.inf:
            raise ValueError(f"Throughput(peak={peak!r}): it must be a number of FLOP/s > 0")
        self.tokens = _tokens if tokens is None else tokens
        self.flops, self.peak = flops, peak
        self.figures: dict[str, float] = {}
        self._counting: Any = None  # the FLOP counter while it watches a micro-batch
        self._counted = (0, 0)  # that micro-batch: its row length and its elements
        self._per_element: dict[int, float] = {}  # by row length: FLOPs for each element of the batch
        self._watches = False
        self._began: float | None = None  # None before the first step is done
        self._evaluations, self._paused_at, self._paused = 0, 0.0, 0.0
        self._reset()

    def _reset(self) -> None:
        self._samples, self._token_count, self._given_flops, self._paused = 0, 0, 0.0, 0.0
        self._device_tokens: Tensor | None = None
        self._elements: Counter[int] = Counter()  # by row length

    def __str__(self) -> str:
        """One line with all of them.

        >>> print(Throughput())
        speed not measured yet
        """
        if not self.figures:
            return "speed not measured yet"
        forms = {"samples_per_second": ",.1f", "tokens_per_second": ",.0f", "tflops": ".4g"}
        units = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s", "tflops": "TFLOP/s"}
        parts = [
            f"{self.figures[name]:{form}} {units[name]}"
            for name, form in forms.items()
            if name in self.figures
        ]
        return ", ".join([*parts, f"MFU {self.figures['mfu']:.1%}" if "mfu" in self.figures else "MFU n/a"])

    # ── timing ────────────────────────────────────────────────────────────────────────────────────────────────

    def on_before_train(self, trainer: Core) -> None:
        self._began, self._evaluations = None, 0
        self._watches = self.flops is True and not _compiled(trainer.model)
        if self.flops is True and not self._watches:
            trainer.logger.info("Throughput: the FLOPs of a compiled model cannot be counted; give flops=")

    def on_after_step(self, trainer: Core) -> None:
        if self._began is None or trainer.step % self.interval == 0:
            now = _now(trainer)
            if self._began is not None:
                self._measure(trainer, now - self._began - self._paused)
            self._began = now
            self._reset()
        trainer.step_info |= self.figures

    def _measure(self, trainer: Core, seconds: float) -> None:
        self.figures = {"samples_per_second": self._samples / seconds}
        tokens = self._token_count + (0 if self._device_tokens is None else int(self._device_tokens))
        if tokens:
            self.figures["tokens_per_second"] = tokens / seconds
        flops = self._given_flops
        if self._watches and all(length in self._per_element for length in self._elements):
            flops = sum(count * self._per_element[length] for length, count in self._elements.items())
        if flops:
            self.figures["tflops"] = flops / seconds / 1e12
            peak = self.peak or peak_flops(trainer.device, trainer.autocast_dtype or _dtype(trainer.model))
            if peak is not None:
                self.figures["mfu"] = flops / seconds / peak

    def on_before_eval(self, trainer: Core) -> None:
        self._stop_watching(keep=False)
        self._evaluations += 1
        if self._evaluations == 1 and self._began is not None:
            self._paused_at = _now(trainer)

    def on_leave_eval(self, trainer: Core) -> None:
        self._evaluations -= 1
        if not self._evaluations and self._began is not None:
            self._paused += _now(trainer) - self._paused_at

    # ── counting ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_before_batch(self, trainer: Core) -> None:
        batch = trainer.batch
        tensor = first_tensor(batch)
        if tensor is None:
            return
        rows = tensor.shape[0] if tensor.ndim else 1
        self._samples += rows
        tokens = self.tokens(batch)
        if isinstance(tokens, Tensor):
            self._device_tokens = tokens if self._device_tokens is None else self._device_tokens + tokens
        else:
            self._token_count += tokens or 0
        length = round(2 * math.log2(max(1.0, tensor.numel() / max(1, rows))))  # within a fifth of each other
        self._elements[length] += tensor.numel()
        if callable(self.flops):
            self._given_flops += self.flops(batch)
        elif self._watches and length not in self._per_element and tensor.numel():
            self._counting, self._counted = _model_flops(), (length, tensor.numel())
            self._counting.__enter__()

    def on_before_optimizer_step(self, trainer: Core) -> None:
        self._stop_watching(keep=True)  # the optimizer's own products are not the model's

    def on_after_batch(self, trainer: Core) -> None:
        self._stop_watching(keep=True)

    def on_close(self, trainer: Core) -> None:
        self._stop_watching(keep=False)

    def _stop_watching(self, keep: bool) -> None:
        counting, self._counting = self._counting, None
        if counting is None:
            return
        counting.__exit__(None, None, None)
        length, elements = self._counted
        if keep and counting.get_total_flops():
            self._per_element[length] = counting.get_total_flops() / elements


def _model_flops() -> Any:
    """A FLOP counter that leaves out what is computed a second time: a forward inside the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    class ModelFlops(FlopCounterMode):
        def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
                return out
            return super()._count_flops(func_packet, out, args, kwargs)

    return ModelFlops(display=False)


def _now(trainer: Core) -> float:
    """Seconds, when the device has done what it was given."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return perf_counter()


def _tokens(batch: Any) -> int | Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.sum()
    return ids.numel() if isinstance(ids, Tensor) else None


def _compiled(model: nn.Module) -> bool:
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())


def _dtype(model: nn.Module) -> torch.dtype:
    """The number format of most parameters."""
    sizes: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        sizes[p.dtype] += p.numel()
    return sizes.most_common(1)[0][0]
