"""A mixture of experts in the place of a feed-forward block.

    y_t = Σ_k w_tk·expert_{i_tk}(x_t)        i, w = gate(x), `gate/top_k.py`        experts: `experts.py`

    x, y (…, D)   i, w (…, K)   E experts, K of them a token, T tokens

Dropless by default: an expert takes whoever comes. With a capacity factor c an expert takes in training at most
⌈c·T·K/E⌉ rows, all tokens' first choices before any second choice, in the tokens' order [1]; a row that finds its
expert full adds nothing, so a token that loses all of them passes by the residual connection alone. In eval mode
nothing is dropped, and a token's output does not depend on its neighbours.

The router needs a loss of its own (`gate/top_k.py`). After a forward the block keeps what its router said in
`routing`, so that the block itself returns y alone and fits everywhere that an MLP does:

    loss = criterion(model(x), target) + moe_aux_loss(model, balance=0.01)

[1] Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668, section 2.2
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orbit.model.errors import MaskError, SettingError, ShapeError, TargetError
from orbit.model.experts import Experts
from orbit.model.gate.top_k import Routing, TopKGate, load_balancing_loss, router_z_loss

__all__ = ["MoE", "moe_aux_loss", "set_moe_training_mode"]


class MoE(nn.Module):
    """Routes every token to `top_k` of `num_experts` feed-forward blocks and adds up what they say.

    Args:
        hidden_size: width of the tokens.
        intermediate_size: width inside an expert.
        num_experts: how many experts there are.
        top_k: experts a token; 2 unless given, or what `gate` has.
        gated, activation: the form of an expert (`Experts`).
        capacity_factor: how much more than its even share an expert takes in training; None for all.
        gate: a router in the place of `TopKGate(hidden_size, num_experts, top_k)`: a module with `num_experts` and
            `k` that turns (T, hidden_size) into a `Routing`.

    Attributes:
        routing: what the router said of all tokens in the last forward; None before the first.
        dropped: how many rows found their expert full in the last forward, a 0-d tensor; None if nothing can be.

    Shapes:
        (…, hidden_size) → the same

    State dict: gate.weight, experts.gate_up_proj (up_proj without a gate) and experts.down_proj, as transformers'
    Mixtral has them.

    Raises:
        SettingError: more experts a token than there are; a gate that does not fit; a capacity factor that is not
            positive.

    >>> moe = MoE(8, 16, num_experts=4, top_k=2)
    >>> moe(torch.randn(2, 5, 8)).shape, moe.routing.indices.shape
    (torch.Size([2, 5, 8]), torch.Size([10, 2]))
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        gated: bool = True,
        activation: str = "silu",
        capacity_factor: float | None = None,
        gate: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not (capacity_factor > 0 and math.isfinite(capacity_factor)):
            raise SettingError(
                f"capacity_factor={capacity_factor}: an expert needs room, 1.25 is usual; None drops nothing"
            )
        if gate is None:
            top_k = 2 if top_k is None else top_k
            gate = TopKGate(hidden_size, num_experts, top_k, device=device, dtype=dtype)
        elif gate.num_experts != num_experts or top_k not in (None, gate.k):
            raise SettingError(
                f"the gate chooses {gate.k} of {gate.num_experts} experts, this block was asked for "
                f"top_k={top_k}, num_experts={num_experts}; leave top_k out and give both as many experts"
            )
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.capacity_factor = capacity_factor
        self.gate = gate
        self.experts = Experts(
            hidden_size,
            intermediate_size,
            num_experts,
            gated=gated,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.routing: Routing | None = None
        self.dropped: Tensor | None = None
        self._real: Tensor | None = None

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Every token through its experts.

        Args:
            x: (…, hidden_size).
            padding_mask: (…) bool, True for real tokens. Padding comes out as 0, takes no expert's room and no
                part in the losses.

        Raises:
            ShapeError: another width.
            MaskError: a mask of another shape, or that is not boolean.
        """
        if x.shape[-1] != self.hidden_size:
            raise ShapeError(
                f"the input has width {x.shape[-1]}, this block was built for {self.hidden_size}"
            )
        x_TD = x.reshape(-1, self.hidden_size)
        routing = self.gate(x_TD)
        indices_TK = routing.indices
        real_T = None
        if padding_mask is not None:
            real_T = _checked(padding_mask, x).reshape(-1)
            indices_TK = indices_TK.masked_fill(~real_T[:, None], self.num_experts)
        dropped = None
        if self.training and self.capacity_factor is not None:
            kept_TK = within_capacity(indices_TK, self.num_experts, self.capacity_factor)
            dropped = (~kept_TK & (indices_TK < self.num_experts)).sum()
            indices_TK = indices_TK.masked_fill(~kept_TK, self.num_experts)
        y = self.experts(x_TD, indices_TK, routing.weights).view(x.shape)
        self.routing, self._real, self.dropped = routing, real_T, dropped
        return y

    def balance_loss(self) -> Tensor:
        """The load-balancing loss of the last forward, 1 for a uniform router (`load_balancing_loss`)."""
        routing = self._said()
        return load_balancing_loss(routing.logits, routing.indices, self._real)

    def z_loss(self) -> Tensor:
        """The z-loss of the last forward (`router_z_loss`)."""
        return router_z_loss(self._said().logits, self._real)

    def _said(self) -> Routing:
        if self.routing is None:
            raise TargetError("the block has routed nothing yet; call it before asking for its losses")
        learns = any(p.requires_grad for p in self.gate.parameters())
        if torch.is_grad_enabled() and learns and not self.routing.logits.requires_grad:
            raise TargetError(
                "the last forward kept no gradient for the router, so its losses would train nothing; run it "
                "with gradients (checkpoint(..., use_reentrant=False) does), or ask under torch.no_grad()"
            )
        return self.routing

    def __getstate__(self) -> dict[str, Any]:
        # What the last forward left belongs to its graph, which can be neither copied nor pickled.
        return {**self.__dict__, "routing": None, "dropped": None, "_real": None}

    def extra_repr(self) -> str:
        return "" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"


def within_capacity(indices: Tensor, num_experts: int, factor: float) -> Tensor:
    """(T, K) bool: which rows find room if each expert takes ⌈factor·rows/E⌉, first choices first.

    Rows of index E, which no expert owns, are not counted, and come out False.
    """
    expert_S, order_S = indices.T.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(num_experts + 1, device=indices.device), right=True)
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    rank_S = torch.arange(len(expert_S), device=indices.device) - starts_E[expert_S]
    room = (ends_E[num_experts - 1].double() * (factor / num_experts)).ceil()
    kept_S = (rank_S < room) & (expert_S < num_experts)
    return kept_S[order_S.argsort()].view(indices.T.shape).T


def moe_aux_loss(model: nn.Module, *, balance: float = 0.01, z: float = 0.0) -> Tensor:
    """What to add to the loss so that routers learn to share: Σ over all MoE blocks of balance·L_balance + z·L_z.

    Of each block's last forward; call it before the backward pass, in the step that ran the model.

    Args:
        model: a model with MoE blocks in it.
        balance: weight of the load-balancing loss; Switch takes 0.01.
        z: weight of the z-loss; ST-MoE takes 0.001.

    Returns:
        A scalar in at least float32.

    Raises:
        TargetError: no MoE block, one that has not run yet, or one that ran without gradients.

    >>> model = nn.Sequential(MoE(8, 16, num_experts=4), nn.Linear(8, 1))
    >>> loss = model(torch.randn(3, 8)).mean() + moe_aux_loss(model)
    """
    losses = [
        balance * moe.balance_loss() + (z * moe.z_loss() if z else 0.0)
        for moe in _blocks(model, "moe_aux_loss")
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def set_moe_training_mode(model: nn.Module, mode: str = "all", verbose: bool = False) -> int:
    """Choose what of the MoE blocks trains; the rest of the model is left alone.

    Args:
        model: a model with MoE blocks in it.
        mode: "all", "router_only" (experts frozen) or "experts_only" (routers frozen).
        verbose: print a line about what was done.

    Returns:
        How many blocks were set.

    Raises:
        SettingError: another mode.
        TargetError: the model has no MoE block.
    """
    modes = {"all": (True, True), "router_only": (True, False), "experts_only": (False, True)}
    if mode not in modes:
        raise SettingError(f"mode={mode!r} is none of {', '.join(map(repr, modes))}")
    router, experts = modes[mode]
    blocks = list(_blocks(model, "set_moe_training_mode"))
    for moe in blocks:
        moe.gate.requires_grad_(router)
        moe.experts.requires_grad_(experts)
    if verbose:
        words = {True: "train", False: "are frozen"}
        print(f"{len(blocks)} MoE blocks: routers {words[router]}, experts {words[experts]}")
    return len(blocks)


def _blocks(model: nn.Module, who: str) -> Iterator[MoE]:
    blocks = [module for module in model.modules() if isinstance(module, MoE)]
    if not blocks:
        raise TargetError(f"{who}() found no MoE block among the {sum(1 for _ in model.modules())} modules")
    return iter(blocks)


def _checked(padding_mask: Tensor, x: Tensor) -> Tensor:
    if padding_mask.dtype is not torch.bool:
        raise MaskError(
            f"padding_mask is {padding_mask.dtype}; it must be bool, True for real tokens: padding_mask.bool()"
        )
    if padding_mask.shape != x.shape[:-1]:
        raise MaskError(
            f"padding_mask has the shape {tuple(padding_mask.shape)}; for an input of the shape "
            f"{tuple(x.shape)} it must have {tuple(x.shape[:-1])}"
        )
    return padding_mask
