"""Next-token cross-entropy over the supervised tokens of a batch.

    loss = 1/N · Σ_{b,t: y_{b,t+1} ≠ ignore} −log p(y_{b,t+1} | x_{b,≤t})        weight = N

Shapes: B rows, T positions, C ≤ T−1 columns where any row is supervised, N supervised tokens, V vocabulary.

Position t predicts the label at t+1. The prompt and the padding carry `ignore_index`, so in fine-tuning most
positions need no logits at all: the model is asked for the C columns only (`logits_to_keep`, which Hugging
Face causal LMs take), and the fp32 copy is made of the N supervised rows (N, V), never of (B, T, V). Finding
them reads the labels on the host, one short wait a micro-batch on an accelerator, paid back by the head.
A batch with no supervised token has loss 0 and weight 0: it contributes nothing to its window.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.core.outcome import Outcome


@dataclass(frozen=True)
class CausalLM:
    """Mean cross-entropy per supervised token of a causal language model.

    Args:
        ignore_index: label that marks a position without supervision.

    >>> CausalLM()(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})   # doctest: +SKIP
    Outcome(loss=tensor(2.31), weight=417.0, records={})
    """

    ignore_index: int = -100
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], ref: Any = None) -> Outcome:
        """Score one micro-batch.

        Args:
            model: called with the batch's entries but `labels`; returns an object with `.logits` (B, T, V),
                a mapping with "logits", or the logits.
            batch: "labels" (B, T) integers aligned with "input_ids" (not shifted), and the model's inputs.
            ref: a reference provider, as every objective takes; this one needs none.

        Returns:
            loss (0-d, fp32; fp64 of an fp64 model) and weight N. With N = 0 the loss is 0, with a graph.

        Raises:
            ValueError: the batch has no labels, or their shape is not that of the input ids.
            TypeError: the model returned nothing that holds logits.
        """
        labels_BT, inputs = self._split(batch)
        target_BT = labels_BT[:, 1:]
        column_C = (target_BT != self.ignore_index).any(dim=0).nonzero().squeeze(1)
        if _keeps_logits(model):
            output = model(**inputs, logits_to_keep=column_C)
            logits_BCV = _logits(output, model)
        else:
            output = model(**inputs)
            logits_BCV = _logits(output, model).index_select(1, column_C)
        target_BC = target_BT.index_select(1, column_C)
        row_BC = target_BC != self.ignore_index
        logits_NV, target_N = logits_BCV[row_BC], target_BC[row_BC]
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        count = target_N.shape[0]
        loss = F.cross_entropy(logits_NV, target_N) if count else logits_NV.sum()
        added = getattr(output, "added_loss", None)  # what a model's own parts ask for, already weighted
        if count and added is not None:
            loss = loss + added
        return Outcome(loss=loss, weight=float(count))

    def _split(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"CausalLM needs a dict batch with 'labels', got {has}: "
                "make samples with build_sft and batches with SFTCollator"
            )
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        ids = inputs.get("input_ids")
        if labels.dim() != 2 or (ids is not None and ids.shape != labels.shape):
            shape = None if ids is None else tuple(ids.shape)
            raise ValueError(
                f"labels {tuple(labels.shape)} must be (batch, length) like input_ids {shape}: "
                "labels are aligned with the inputs, the shift happens here"
            )
        return labels, inputs


def _keeps_logits(model: nn.Module) -> bool:
    """Whether the model's own forward names `logits_to_keep`; DDP and compile are looked through."""
    inner: Any = model
    while inner is not None:
        parameters = inspect.signature(inner.forward).parameters.values()
        if any(p.name == "logits_to_keep" for p in parameters):
            return True
        passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None)) if passes_on else None
    return False


def _logits(output: Any, model: nn.Module) -> Tensor:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise TypeError(
            f"{type(model).__name__} returned {got}; CausalLM needs logits (batch, length, vocabulary), "
            "as a tensor, under '.logits' or under the key 'logits'"
        )
    return logits
