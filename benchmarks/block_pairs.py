"""The blocks that `blocks.py` times ours against: what a careful engineer writes by hand for one fixed use.

Each takes the weights of our block and must give the same outputs and gradients before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # how far two ways to compute the same may lie apart

Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of the blocks and of what runs through them."""

    hidden: int = 512
    heads: int = 8
    kv_heads: int = 2
    batch: int = 4
    length: int = 256
    experts: int = 8
    top_k: int = 2
    intermediate: int = 1024
    tokens: int = 2048  # through the experts
    vocabulary: int = 32768  # of the model that is initialised, of 100 million parameters
    layers: int = 21


class HandWrittenAttention(nn.Module):
    """Causal self-attention of grouped queries, with the four projections and torch's own kernel between them."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.grouped = heads != kv_heads

    def forward(self, x_BTD: Tensor, rotation: Rotation | None = None) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTD = self.q_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        k_BGTD = self.k_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        v_BGTD = self.v_proj(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
        if rotation is not None:
            q_BHTD, k_BGTD = rotated(q_BHTD, *rotation), rotated(k_BGTD, *rotation)
        y_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=self.grouped
        )
        y: Tensor = self.o_proj(y_BHTD.transpose(1, 2).reshape(B, T, -1))
        return y


def rotated(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos + torch.cat((-second, first), dim=-1) * sin


def rotation_of(head_dim: int, length: int, device: str, dtype: torch.dtype) -> Rotation:
    """Cosine and sine of every position and channel, (T, D), as Llama has them."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.arange(length, device=device).float()[:, None] * frequency.repeat(2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Expert(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Loop(nn.Module):
    """A mixture of experts as a careful loop: tokens sorted by expert once, every expert runs its own alone."""

    def __init__(self, hidden: int, intermediate: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, intermediate) for _ in range(experts))
        self.top_k = top_k

    def take(self, state: dict[str, Tensor]) -> None:
        """The weights of our block."""
        with torch.no_grad():
            self.router.weight.copy_(state["gate.weight"])
            for number, expert in enumerate(self.experts):
                gate, up = state["experts.gate_up_proj"][number].chunk(2)
                expert.load_state_dict(
                    {
                        "gate_proj.weight": gate,
                        "up_proj.weight": up,
                        "down_proj.weight": state["experts.down_proj"][number],
                    }
                )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        probability = self.router(x_ND).softmax(-1, dtype=torch.float32)
        weight_NK, expert_NK = probability.topk(self.top_k, dim=-1)
        weight_NK = (weight_NK / weight_NK.sum(-1, keepdim=True)).to(x_ND.dtype)
        order = expert_NK.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = torch.bincount(expert_NK.flatten(), minlength=len(self.experts)).tolist()
        parts = x_ND.index_select(0, token).split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = y * weight_NK.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x_ND).index_add(0, token, y).view_as(x_BTD)


class Pass:
    """A block over its inputs as a call: forward alone, or forward and backward down to inputs and weights."""

    def __init__(
        self, run: Callable[..., Any], inputs: Sequence[Tensor], weights: Iterable[Tensor] = ()
    ) -> None:
        self.run = run
        self.inputs = [x.detach().clone().requires_grad_() for x in inputs]
        self.leaves = [*self.inputs, *weights]
        noise = torch.Generator().manual_seed(5)
        self.upstream = [torch.randn(y.shape, generator=noise).to(y) for y in self.forward()]

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tensors(self.run(*self.inputs))

    def backward(self) -> tuple[Tensor, ...]:
        outputs = tensors(self.run(*self.inputs))
        torch.autograd.backward(outputs, self.upstream)
        for leaf in self.leaves:
            leaf.grad = None
        return outputs

    def results(self) -> list[Tensor]:
        """Outputs and the gradients of the inputs."""
        outputs = tensors(self.run(*self.inputs))
        return [*outputs, *torch.autograd.grad(outputs, self.inputs, self.upstream)]


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def check_same(mine: Pass, theirs: Pass, what: str) -> None:
    """AssertionError unless both give the same outputs and the same gradients of their inputs."""
    for number, (a, b) in enumerate(zip(mine.results(), theirs.results(), strict=True)):
        error = ((a - b).float().norm() / b.float().norm()).item()
        assert error < ROUNDING[b.dtype], f"{what}: result {number} differs by {error:.1e} of its size"
