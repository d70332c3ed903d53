"""The router of a mixture of experts: each token's k most likely experts, and the losses that balance it.

    l = W·x + ε,  ε ~ N(0, noise²) in training        p = softmax(l)
    i_1…i_k = the k largest of p                      w_j = p_{i_j},  or  p_{i_j} / Σ_j p_{i_j}  if `normalize`

    x (…, D)   W (E, D)   l, p (…, E)   i, w (…, K)        D width, E experts, K experts a token, T tokens

Normalised weights are the softmax over the k chosen logits alone: Mixtral, and the default for k > 1. With one
expert a token they would all be 1 and teach the router nothing, so Switch [1] leaves p as it is: the default
for k = 1. Softmax and weights are computed in at least float32.

    balance = E·Σ_e f_e·P_e        f_e share of the T·K choices that fell on expert e, P_e mean of p_e over tokens
    z       = mean over tokens of (logsumexp l)²

The balance loss [1, eq. 4] is 1 for a router whose p is uniform, and E where one expert takes all. Its gradient
runs through P alone. The z-loss [2] keeps logits small. Both leave padding out.

[1] Fedus et al. 2021, https://arxiv.org/abs/2101.03961    [2] Zoph et al. 2022, https://arxiv.org/abs/2202.08906
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.model.errors import SettingError, ShapeError

__all__ = ["Routing", "TopKGate", "load_balancing_loss", "router_z_loss"]


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        weights: (…, K) by how much each chosen expert counts, in at least float32.
        indices: (…, K) the chosen experts, the most likely first.
        logits: (…, E) of all experts.
    """

    weights: Tensor
    indices: Tensor
    logits: Tensor


class TopKGate(nn.Module):
    """Chooses k experts for every token.

    Args:
        in_features: width of the tokens.
        num_experts: how many experts there are to choose from.
        k: experts a token.
        normalize: make a token's weights sum to 1; by default where k > 1.
        noise: standard deviation of what is added to the logits in training, so that experts near the choice are
            tried too.

    Shapes:
        (…, in_features) → Routing

    Raises:
        SettingError: k is not between 1 and the number of experts, or is 1 with `normalize`; negative noise.

    >>> gate = TopKGate(8, num_experts=4, k=2)
    >>> weights, indices, logits = gate(torch.randn(3, 8))
    >>> indices.shape, bool((weights.sum(-1) - 1).abs().max() < 1e-6)
    (torch.Size([3, 2]), True)
    """

    initialized_as = "gate"  # by auto_initialize, which calls reset_parameters

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        k: int = 2,
        *,
        normalize: bool | None = None,
        noise: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or num_experts < 1:
            raise SettingError(
                f"in_features={in_features}, num_experts={num_experts}: both must be at least 1"
            )
        if not 1 <= k <= num_experts:
            raise SettingError(
                f"k={k}: a token can go to 1 to {num_experts} of {num_experts} experts; lower k or add experts"
            )
        if normalize and k == 1 and num_experts > 1:
            raise SettingError(
                "normalize=True with k=1 makes every weight 1, from which the router learns nothing; "
                "leave normalize out, or choose k=2"
            )
        if not (noise >= 0 and math.isfinite(noise)):
            raise SettingError(f"noise={noise} is no standard deviation; 0 switches it off")
        self.in_features, self.num_experts, self.k = in_features, num_experts, k
        self.normalize = k > 1 if normalize is None else normalize
        self.noise = noise
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W ~ U(−1/√D, 1/√D), as `nn.Linear` draws it."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Routing:
        """(…, in_features) → weights and indices (…, K), logits (…, E)."""
        if x.shape[-1] != self.in_features:
            raise ShapeError(
                f"the input has width {x.shape[-1]}, this gate was built for in_features={self.in_features}"
            )
        logits = F.linear(x, self.weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        weights, indices = logits.softmax(-1).topk(self.k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(weights, indices, logits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, num_experts={self.num_experts}, k={self.k}, normalize={self.normalize}"


def load_balancing_loss(logits: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """E·Σ_e f_e·P_e: 1 for uniform probabilities, more where experts are crowded.

    Args:
        logits: (…, E) of the router.
        indices: (…, K) the experts that it chose.
        mask: (…) bool, True for real tokens; all of them unless given.

    Returns:
        A scalar in at least float32. transformers' `load_balancing_loss_func` gives K times this.
    """
    probabilities = logits.softmax(-1).flatten(0, -2)
    chosen = F.one_hot(indices, logits.shape[-1]).sum(-2).flatten(0, -2).to(probabilities.dtype)
    share = _mean(chosen, mask) / indices.shape[-1]
    return logits.shape[-1] * (share * _mean(probabilities, mask)).sum()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared logsumexp of the router's logits (…, E), over tokens where `mask` (…) is True."""
    return _mean(logits.logsumexp(-1).square().flatten()[:, None], mask).sum()


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over the first dimension; 0 where no token is real."""
    if mask is None:
        return values.sum(0) / max(len(values), 1)
    real = mask.flatten().to(values.dtype)
    return real @ values / real.sum().clamp_min(1)
