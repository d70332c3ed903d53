"""The classifier: hidden states to scalings.

    z = f(h)                                     f: Linear, or Linear (ReLU, Dropout) … Linear of `xlora_depth`
    p = softmax(z / T)                           the prediction, which is logged; z itself without softmax
    s = w·p over the top k experts of each token and layer, 0 for the others; optionally s = w·softmax(p) over them

    h (batch, seq, hidden)     z, p, s (batch, seq, layers, experts), with stride 0 along layers unless layerwise

Source: Buehler & Buehler 2024 (arXiv 2402.07148) and the two public implementations, whose top-k softmax is meant
per token and layer, as here. The classifier computes in its own dtype, float32 by default also on a
bf16 base and under autocast.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from orbit.adapter.owners import Beside
from orbit.xlora.config import xLoRAConfig


class Classifier(Beside):
    """The router of a mixture: `layers`, a Sequential with the indices that PEFT's files have.

    Args:
        n_layers: of the model that carry experts.
        n_experts: the scalings per token and layer.
    """

    def __init__(self, config: xLoRAConfig, n_layers: int, n_experts: int, *, device: torch.device) -> None:
        super().__init__()
        self.n_layers, self.n_experts = n_layers, n_experts
        self.layerwise = config.layerwise_scalings
        out = n_experts * n_layers if config.layerwise_scalings else n_experts
        widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1)]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers.append(nn.Linear(wide, narrow, bias=config.use_bias, device=device, dtype=torch.float32))
            if config.enable_relu_and_dropout:
                layers.append(nn.ReLU())
                if config.xlora_dropout_p > 0:
                    layers.append(nn.Dropout(config.xlora_dropout_p))
        layers.append(nn.Linear(widths[-1], out, bias=config.use_bias, device=device, dtype=torch.float32))
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden: Tensor, config: xLoRAConfig) -> Tensor:
        """The prediction p (batch, seq, layers, experts) for hidden states (batch, seq, hidden)."""
        weight = next(self.layers.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            logits: Tensor = self.layers(hidden.to(weight.device, weight.dtype))
        batch, seq = hidden.shape[:2]
        logits = logits.view(batch, seq, -1, self.n_experts)
        if config.enable_softmax:
            logits = torch.softmax(logits / config.softmax_temperature, -1)
        return logits.expand(batch, seq, self.n_layers, self.n_experts)


def applied(prediction: Tensor, config: xLoRAConfig) -> Tensor:
    """The scalings s that layers are given, for a prediction p; shapes as in the module's legend."""
    once = prediction if prediction.stride(2) else prediction[:, :, :1]
    s = once
    if config.top_k_lora is not None:
        chosen = once.topk(config.top_k_lora, -1).indices
        left = torch.zeros_like(once, dtype=torch.bool).scatter_(-1, chosen, True)
        s = once.masked_fill(~left, 0.0)
        if config.enable_softmax_topk:
            s = torch.softmax(once.masked_fill(~left, float("-inf")), -1)
    elif config.enable_softmax_topk:
        s = torch.softmax(once, -1)
    return (config.global_scaling_weight * s).expand_as(prediction)
