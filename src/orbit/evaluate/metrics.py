"""Metrics of text. Each says by `needs` which pass it reads, "score" or "generate" (`orbit.evaluate.passes`).

A metric is called with the samples of its pass, and returns a number, or several by name. One of your own is a class
with the same two things, registered by `@register.metric("NAME")`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from orbit.core.extras import need
from orbit.evaluate.passes import EvaluationError, Reply, SampleScore

PASSES = ("score", "generate")


class Metric(Protocol):
    """What `METRIC_REGISTRY` holds, once it has its arguments."""

    needs: ClassVar[str]

    def __call__(self, samples: Sequence[Any], /) -> float | Mapping[str, float]: ...


@dataclass(frozen=True)
class Loss:
    """Mean of −log p over the supervised tokens, in nats: every token weighs the same.

    >>> Loss()([SampleScore(0, nll=3.0, tokens=1), SampleScore(1, nll=1.0, tokens=3)])
    1.0
    """

    needs: ClassVar[str] = "score"

    def __call__(self, samples: Sequence[SampleScore], /) -> float:
        """Raises EvaluationError where no token is supervised."""
        tokens = sum(sample.tokens for sample in samples)
        if not tokens:
            raise EvaluationError("no token is supervised: is max_length shorter than the prompts?")
        return math.fsum(sample.nll for sample in samples) / tokens


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean −log p over the supervised tokens.

    >>> round(Perplexity()([SampleScore(0, nll=math.log(8), tokens=3)]), 6)
    2.0
    """

    needs: ClassVar[str] = "score"

    def __call__(self, samples: Sequence[SampleScore], /) -> float:
        """Raises as `Loss`. Infinite where a float64 cannot hold it."""
        loss = Loss()(samples)
        return math.inf if loss > 709 else math.exp(loss)


@dataclass(frozen=True)
class ExactMatch:
    """Share of replies that are the whole answer: one of them, where there are several.

    Both sides are stripped of white space and of one closing full stop, and case-folded.

    >>> ExactMatch()([Reply(0, "?", "Accra.", ("accra",)), Reply(1, "?", "It is Accra.", ("Accra",))])
    0.5
    """

    needs: ClassVar[str] = "generate"

    def __call__(self, samples: Sequence[Reply], /) -> float:
        hits = [normalise(reply.text) in map(normalise, reply.references) for reply in samples]
        return sum(hits) / len(hits)


@dataclass(frozen=True)
class Rouge:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) by the package rouge-score: F-measures, and the recall of ROUGE-L.

    Means over replies; of several answers the best for each. The package reads Latin letters and digits alone.

    Args:
        use_stemmer: Porter's, so that "runs" matches "run".

    Raises:
        MissingExtraError: rouge-score is not installed.
    """

    use_stemmer: bool = True
    needs: ClassVar[str] = "generate"

    def __post_init__(self) -> None:
        need("eval", "rouge_score")

    def __call__(self, samples: Sequence[Reply], /) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=self.use_stemmer)
        sums = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeL_recall"), 0.0)
        for reply in samples:
            scores = [scorer.score(answer, reply.text) for answer in reply.references]
            for name in ("rouge1", "rouge2", "rougeL"):
                sums[name] += max(score[name].fmeasure for score in scores)
            sums["rougeL_recall"] += max(score["rougeL"].recall for score in scores)
        return {name: total / len(samples) for name, total in sums.items()}


def normalise(text: str) -> str:
    """
    >>> normalise(" Port Louis. ")
    'port louis'
    """
    return text.strip().removesuffix(".").rstrip().casefold()
