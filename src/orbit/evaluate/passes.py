"""Running a model over a dataset: what the metrics that need the same pass share.

score      the log-probs of the supervised tokens, as the objective of fine-tuning has them → `SampleScore`
generate   greedy replies to the prompts → `Reply`

Both go through the samples longest first, so that batches pad little and what does not fit into memory fails at once;
the results are in the dataset's order. Modes of the modules are put back, and no generator is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import IterableDataset

from orbit.chat.head import contiguous_head
from orbit.core.modes import evaluating
from orbit.data.collate import SFTCollator
from orbit.data.package import IGNORE_INDEX
from orbit.data.sft import pad_token_id
from orbit.objective.scoring import score

_T = TypeVar("_T")
_R = TypeVar("_R")


class EvaluationError(ValueError):
    """A dataset or a model on which a metric cannot be measured."""


@dataclass(frozen=True)
class SampleScore:
    """A sample as the model scores it.

    Attributes:
        index: of the dataset's item.
        nll: −Σ log p of its supervised tokens, in nats.
        tokens: how many those are; 0 of a sample that was cut before its answer.
    """

    index: int
    nll: float
    tokens: int


@dataclass(frozen=True)
class Reply:
    """What the model says to a prompt.

    Attributes:
        index: of the dataset's item.
        prompt: as text, special tokens and all.
        text: the reply, without special tokens and surrounding white space.
        references: the answers that would be right, one or several.
    """

    index: int
    prompt: str
    text: str
    references: tuple[str, ...]


def score_pass(model: nn.Module, dataset: Any, tokenizer: Any, batch_size: int) -> list[SampleScore]:
    """Score every sample of a dataset whose items have "input_ids" and "labels"; of several answers, each.

    Raises:
        EvaluationError: a stream, an empty dataset, or items that are no samples.
    """
    found = [(index, sample) for index, item in _items(dataset) for sample in _answers(item, index)]
    collate = SFTCollator(tokenizer)
    device = next(model.parameters()).device

    def run(samples: Sequence[tuple[int, Mapping[str, Any]]]) -> list[SampleScore]:
        kept = [{key: sample[key] for key in ("input_ids", "labels")} for _, sample in samples]
        batch = {key: value.to(device) for key, value in collate(kept).items()}
        if not bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()):
            return [SampleScore(index, 0.0, 0) for index, _ in samples]
        labels = batch.pop("labels")
        scored = score(model, batch, labels)
        nll_B, count_B = -scored.logps().double().sum(1), scored.mask_BC.sum(1)
        return [
            SampleScore(index, nll, count)
            for (index, _), nll, count in zip(samples, nll_B.tolist(), count_B.tolist(), strict=True)
        ]

    return _longest_first(model, found, lambda one: len(one[1]["input_ids"]), run, batch_size)


def generate_pass(
    model: nn.Module, dataset: Any, tokenizer: Any, batch_size: int, max_new_tokens: int
) -> list[Reply]:
    """Greedy replies to every prompt of a dataset that was made with `predict_with_generate=True`.

    Args:
        dataset: "input_ids" of an item are the prompt, its supervised "labels" the answer.
        max_new_tokens: replies are cut here.

    Raises:
        EvaluationError: as `score_pass`, and a model that does not generate.
    """
    if not callable(getattr(model, "generate", None)):
        raise EvaluationError(f"{type(model).__name__} has no generate(): leave out the metrics of replies")
    found = [(index, _answers(item, index)) for index, item in _items(dataset)]
    ends = _end(model, tokenizer)

    def run(some: Sequence[tuple[int, list[Mapping[str, Any]]]]) -> list[Reply]:
        prompts = [torch.as_tensor(samples[0]["input_ids"]).tolist() for _, samples in some]
        said = greedy_replies(model, tokenizer, prompts, max_new_tokens, **ends)
        return [
            Reply(
                index,
                tokenizer.decode(prompt),
                text,
                tuple(_reference(sample, tokenizer) for sample in samples),
            )
            for (index, samples), prompt, text in zip(some, prompts, said, strict=True)
        ]

    return _longest_first(model, found, lambda one: len(one[1][0]["input_ids"]), run, batch_size)


def greedy_replies(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int, **settings: Any
) -> list[str]:
    """What the model says to each of these prompts, which go through it as one batch padded on the left.

    Args:
        model: as it is: what is to be put into evaluation mode, is.
        prompts: token ids.
        settings: further arguments of `model.generate`.

    Returns:
        The replies as text, without special tokens and surrounding white space.
    """
    device, pad = next(model.parameters()).device, pad_token_id(tokenizer)
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    with contiguous_head(model):
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            **settings,
        )
    said = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in said]


def _longest_first(
    model: nn.Module,
    found: list[_T],
    length: Callable[[_T], int],
    run: Callable[[Sequence[_T]], list[_R]],
    batch_size: int,
) -> list[_R]:
    order = sorted(range(len(found)), key=lambda i: -length(found[i]))
    results: dict[int, _R] = {}
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            results.update(zip(places, run([found[i] for i in places]), strict=True))
    return [results[i] for i in range(len(found))]


def _items(dataset: Any) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    if isinstance(dataset, IterableDataset):
        raise EvaluationError("a stream cannot be evaluated on, which sorts by length: say streaming=false")
    if not len(dataset):
        raise EvaluationError("the dataset is empty")
    for index in range(len(dataset)):
        yield index, dataset[index]


def _answers(item: Mapping[Any, Any], index: int) -> list[Mapping[str, Any]]:
    """The item, or its several answers: {0: sample, 1: sample, ..., "index": number}."""
    if "input_ids" in item and "labels" in item:
        return [item]
    samples = [value for key, value in item.items() if isinstance(key, int)]
    if not samples or not all("input_ids" in one and "labels" in one for one in samples):
        raise EvaluationError(
            f"item {index} has {', '.join(map(str, item))}: evaluation takes 'input_ids' and 'labels'"
        )
    return samples


def _reference(sample: Mapping[str, Any], tokenizer: Any) -> str:
    labels = torch.as_tensor(sample["labels"])
    return str(tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=True)).strip()


def _end(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Every token that ends a reply: the model's own, and that by which the tokenizer ends a turn."""
    known: set[int] = set()
    for one in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ends = getattr(one, "eos_token_id", None)
        known |= set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    return {"eos_token_id": sorted(known)} if known else {}
