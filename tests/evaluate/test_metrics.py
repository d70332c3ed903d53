"""Metrics of text, by hand and against rouge-score's own means."""

from __future__ import annotations

import math

import pytest
from rouge_score.rouge_scorer import RougeScorer

from orbit.evaluate import EvaluationError, ExactMatch, Loss, Perplexity, Reply, Rouge, SampleScore


def test_loss_weighs_tokens_and_not_samples() -> None:
    samples = [SampleScore(0, 4.0, 1), SampleScore(1, 2.0, 5), SampleScore(2, 0.0, 0)]
    assert Loss()(samples) == 1.0
    assert Perplexity()(samples) == math.e
    assert Perplexity()([SampleScore(0, 1e6, 1)]) == math.inf


@pytest.mark.parametrize("metric", [Loss(), Perplexity()])
def test_nothing_supervised_is_no_loss(metric: Loss | Perplexity) -> None:
    with pytest.raises(EvaluationError, match="no token is supervised"):
        metric([SampleScore(0, 0.0, 0)])


def test_one_of_several_answers_is_enough() -> None:
    replies = [
        Reply(0, "", "Port Louis.", ("Paris", "port louis")),
        Reply(1, "", "it is Mali", ("Mali",)),
        Reply(2, "", "", ("x",)),
        Reply(3, "", "1957", ("1957",)),
    ]
    assert ExactMatch()(replies) == 0.5


@pytest.mark.parametrize("stem", [True, False])
def test_rouge_is_the_mean_of_the_best(stem: bool) -> None:
    replies = [
        Reply(0, "", "the cats ran home", ("a cat runs home", "the dog slept")),
        Reply(1, "", "nothing", ("something else",)),
    ]
    found = Rouge(use_stemmer=stem)(replies)
    first = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem)
    for name in ("rouge1", "rouge2", "rougeL"):
        best = max(first.score(one, replies[0].text)[name].fmeasure for one in replies[0].references)
        assert found[name] == pytest.approx(best / 2)
    assert found["rougeL_recall"] == pytest.approx(0.25 if stem else 1 / 6)
