"""Each step from logits to a token, against transformers' processor of the same name."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orbit.model.decoder import sampling
from orbit.model.decoder.sampling import Sampling

SCORES = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)) * 3
SCORES[0, :4] = SCORES[0].max()  # some are equal
IDS = torch.randint(30, (6, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("penalty", [1.5, 0.6])
def test_repetition_penalty(penalty):
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(IDS, SCORES.clone())
    assert (wanted != SCORES).any(dim=1).all()
    assert (wanted[SCORES < 0] != SCORES[SCORES < 0]).any()
    assert torch.equal(sampling._penalised(SCORES, IDS, None, penalty), wanted)
    real = torch.ones_like(IDS, dtype=torch.bool)
    assert torch.equal(sampling._penalised(SCORES, IDS, real, penalty), wanted)
    real[:, :7] = False
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(IDS[:, 7:], SCORES.clone())
    assert torch.equal(sampling._penalised(SCORES, IDS, real, penalty), wanted)


@pytest.mark.parametrize("k", [1, 2, 7, 30, 99])
def test_top_k(k):
    assert torch.equal(sampling._top_k(SCORES, k), TopKLogitsWarper(k)(IDS, SCORES))


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p(p):
    assert torch.equal(sampling._top_p(SCORES, p), TopPLogitsWarper(p)(IDS, SCORES))


def test_their_order(monkeypatch):
    """The distribution that the token is drawn from."""
    seen = []
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *_, **__: seen.append(p) or p.argmax(-1, keepdim=True)
    )
    Sampling(True, 0.5, 9, 0.8, 1.4).choose(SCORES, IDS, None, None)
    steps = [
        RepetitionPenaltyLogitsProcessor(1.4),
        TemperatureLogitsWarper(0.5),
        TopKLogitsWarper(9),
        TopPLogitsWarper(0.8),
    ]
    assert torch.equal(seen[0], LogitsProcessorList(steps)(IDS, SCORES.clone()).softmax(-1))


def test_draws_have_their_probabilities():
    scores = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(20_000, 1)
    drawn = Sampling(True).choose(scores, scores.long(), None, torch.Generator().manual_seed(0))
    assert drawn.bincount().div(20_000).tolist() == pytest.approx([0.5, 0.25, 0.25], abs=0.015)
