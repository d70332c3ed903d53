"""Rotary positions: transformers' Llama rotation and scalings, and what a rotation must keep by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from orbit.model import RotaryPositionalEmbedding, rotate
from orbit.model.errors import SettingError, ShapeError

H, D, TRAINED = 3, 16, 32

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn, all settings": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 500,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, a ramp of no width": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
    "yarn, its own amplitude": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}


def transformers_rotation(x: Tensor, positions: Tensor, base: float, scaling: dict[str, Any]) -> Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=H * D,
        num_attention_heads=H,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_theta": base, **scaling},
    )
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


@pytest.mark.parametrize("length", [TRAINED // 2, 4 * TRAINED])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_equals_transformers(name: str, base: float, length: int):
    scaling = SCALINGS[name]
    x = torch.randn(2, H, length, D)
    expected = transformers_rotation(x, torch.arange(length)[None], base, scaling)
    rope = RotaryPositionalEmbedding(D, base, scaling=scaling)
    torch.testing.assert_close(rotate(x, rope(torch.arange(length))), expected, atol=2e-6, rtol=0)


def test_positions_of_each_row():
    x = torch.randn(2, H, 3, D)
    positions = torch.tensor([[0, 1, 2], [7, 100, 5]])
    rope = RotaryPositionalEmbedding(D)
    found = rotate(x, rope(positions))
    torch.testing.assert_close(found, transformers_rotation(x, positions, 10000.0, {"rope_type": "default"}))
    torch.testing.assert_close(found[1:], rotate(x[1:], rope(positions[1])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype):
    """Angles are made in float32 whatever turns: in bfloat16 position 257 would be 256."""
    x, positions = torch.randn(1, H, 4, D, dtype=dtype), torch.tensor([0, 257, 5000, 70001])
    rope = RotaryPositionalEmbedding(D).to(dtype)
    found = rotate(x, rope(positions))
    assert found.dtype is dtype
    wanted = rotate(x.float(), rope(positions))
    torch.testing.assert_close(found.float(), wanted, atol=0.05 if dtype is torch.bfloat16 else 5e-3, rtol=0)
    assert rope(positions, dtype).cos.dtype is dtype


def test_scores_depend_on_distances_alone():
    q, k = torch.randn(2, 1, H, 1, D, dtype=torch.float64)
    rope = RotaryPositionalEmbedding(D)

    def score(i: int, j: int) -> Tensor:
        return rotate(q, rope(torch.tensor([i]))) @ rotate(k, rope(torch.tensor([j]))).mT

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=0)
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-2
    torch.testing.assert_close(rotate(q, rope(torch.tensor([50]))).norm(), q.norm(), atol=1e-6, rtol=0)


def test_part_of_a_head():
    x = torch.randn(2, H, 5, D)
    rope, small = RotaryPositionalEmbedding(D, rotary_dim=6), RotaryPositionalEmbedding(6)
    found = rotate(x, rope(torch.arange(5)))
    assert torch.equal(found[..., 6:], x[..., 6:])
    assert torch.equal(found[..., :6], rotate(x[..., :6], small(torch.arange(5))))


def test_ntk_interpolates_the_slowest_pair_by_the_factor_and_leaves_the_fastest():
    plain, scaled = (
        RotaryPositionalEmbedding(D, scaling=scaling)
        for scaling in (None, {"rope_type": "ntk", "factor": 4.0})
    )
    positions = torch.tensor([1])
    turn, stretched = (torch.atan2(-r(positions).sin, r(positions).cos)[0, : D // 2] for r in (plain, scaled))
    ratio = turn / stretched
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 4.0]))
    assert (ratio.diff() > 0).all()


def test_nothing_is_stored():
    with torch.device("meta"):
        rope = RotaryPositionalEmbedding(D)
    assert list(rope.buffers()) == []
    assert rope.state_dict() == {}
    plain = RotaryPositionalEmbedding(D)
    for mine, other in zip(rope(torch.arange(9)), plain(torch.arange(9)), strict=True):
        assert torch.equal(mine, other)


YARN = SCALINGS["yarn"]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RotaryPositionalEmbedding(7), "head_dim 7 .* pairs"),
        (lambda: RotaryPositionalEmbedding(0), "head_dim 0"),
        (lambda: RotaryPositionalEmbedding(8, rotary_dim=3), "rotary_dim 3"),
        (lambda: RotaryPositionalEmbedding(8, rotary_dim=10), "rotary_dim 10 .* to 8"),
        (lambda: RotaryPositionalEmbedding(8, base=1.0), "base 1.0"),
        (lambda: RotaryPositionalEmbedding(8, scaling={"rope_type": "yarm"}), "'yarm' is unknown"),
        (lambda: RotaryPositionalEmbedding(8, scaling={"factor": 2.0}), "None is unknown"),
        (lambda: RotaryPositionalEmbedding(8, scaling={"rope_type": "linear"}), "needs factor"),
        (lambda: RotaryPositionalEmbedding(8, scaling={**YARN, "rope_theta": 1e4}), "takes no rope_theta"),
        (lambda: RotaryPositionalEmbedding(8, scaling={**YARN, "factor": 0.5}), "factor 0.5"),
        (
            lambda: RotaryPositionalEmbedding(8, scaling={**SCALINGS["llama3"], "low_freq_factor": 4.0}),
            "low_freq",
        ),
        (lambda: RotaryPositionalEmbedding(2, scaling={"rope_type": "ntk", "factor": 2.0}), "at least 4"),
    ],
)
def test_bad_settings(build: Callable[[], object], words: str):
    with pytest.raises(SettingError, match=words):
        build()


def test_bad_inputs():
    rope = RotaryPositionalEmbedding(D)
    for positions in (torch.arange(3.0), torch.ones(3).bool(), torch.zeros(1, 1, 3).long()):
        with pytest.raises(ShapeError, match="positions are integers"):
            rope(positions)
    rotation = rope(torch.arange(3))
    with pytest.raises(ShapeError, match="3 positions and 16 dimensions"):
        rotate(torch.randn(1, 1, 4, D), rotation)
    with pytest.raises(ShapeError, match="3 positions and 16 dimensions"):
        rotate(torch.randn(1, 1, 3, 8), rotation)
    with pytest.raises(ShapeError, match="2 rows"):
        rotate(torch.randn(3, 1, 3, D), rope(torch.zeros(2, 3).long()))
    with pytest.raises(SettingError, match="not as tuple"):
        rotate(torch.randn(1, 1, 3, D), tuple(rotation))
