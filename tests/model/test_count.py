"""count_params: tied parameters once, packed ones as what they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orbit.model import count_params
from orbit.model.errors import ShapeError


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    assert count_params(model) == 10 * 4 + 4 * 10 + 10
    model[1].weight = model[0].weight
    assert count_params(model) == 10 * 4 + 10
    model[0].weight.requires_grad_(False)
    assert count_params(model, trainable_only=True) == 10
    assert count_params(model) == 50


def test_buffers_are_no_parameters_and_the_meta_device_is_counted() -> None:
    assert count_params(nn.BatchNorm2d(6)) == 12
    assert count_params(nn.Linear(1000, 1000, device="meta")) == 1_001_000


def test_a_weight_of_four_bits_counts_as_what_it_stands_for() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    assert layer.weight.numel() < 64 * 32
    assert count_params(layer) == 64 * 32
    assert count_params(layer, trainable_only=True) == 0


def test_a_lazy_layer_has_no_number_yet() -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ShapeError, match=r"0\.weight has no shape yet.*model\(example\)"):
        count_params(lazy)
    lazy(torch.ones(1, 2))
    assert count_params(lazy) == 9
