"""What a mixture computes, written out densely from its equations, and the tiny models to compare on.

    h = decoder(tokens) with W + v·w·Σ_i (W_i − W) at every layer, v the scaling pass value, w the global weight
    y = W x + Σ_i s_i (W_i − W) x       W_i = W + ΔW_i, of DoRA m·(W + ΔW_i)/‖W + ΔW_i‖; s_i a number per token

Nothing here comes from the code under test but the tensors of A, B and m and the classifier's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, adapter_parameters, inject
from orbit.xlora import mix, xLoRAConfig

HIDDEN, VOCABULARY = 32, 64
NAMES = ("facts", "chat", "law", "poems")


def llama(seed: int = 7, **options: Any) -> Any:
    """A Llama of 2 layers and width 32, always the same one, whose tokens matter (`initializer_range`)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()


def tokens(batch: int = 3, seq: int = 9) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(3))


def expert(model: nn.Module, name: str, seed: int = 0, size: float = 0.2, **config: Any) -> None:
    """A task in which every tensor has something."""
    inject(model, AdapterConfig(**{"r": 4, "alpha": 8, **config}), name)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise).to(parameter))


def mixture(model: Any = None, experts: Mapping[str, Mapping[str, Any]] | int = 4, **config: Any) -> Any:
    """`model`, a Llama by default, as a mixture of `experts` (name → its config), with a classifier that decides."""
    model = llama() if model is None else model
    if isinstance(experts, int):
        experts = {name: {} for name in NAMES[:experts]}
    for seed, (name, options) in enumerate(experts.items()):
        expert(model, name, seed, **options)
    mixed = mix(
        model,
        tuple(experts),
        xLoRAConfig(**{"hidden_size": HIDDEN, "xlora_size": 16, "xlora_dropout_p": 0.0, **config}),
    )
    return decided(mixed)


def decided(mixed: Any, seed: int = 5) -> Any:
    """The same mixture with a classifier whose scalings differ from token to token."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixed.xlora_classifier.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=noise))
    return mixed


# -- the dense oracle ----------------------------------------------------------------------------------------


def changes(mixed: Any) -> dict[str, list[Tensor | None]]:
    """W_i − W in the weight's shape for every layer with experts, by its name; None where an expert has none."""
    found: dict[str, list[Tensor | None]] = {}
    for path, layer in mixed.xlora_layers().items():
        found[path] = [
            _change(layer, name) if name in layer.slots() else None for name in mixed.xlora_experts
        ]
    return found


def _change(layer: Any, name: str) -> Tensor:
    slot = layer.slots()[name]
    A, B, s = (
        slot.down.weight,
        slot.up.weight,
        slot.up.alpha / slot.up.weight.shape[1] ** (0.5 if slot.up.rslora else 1),
    )
    delta = (s if slot.gate is None else s * slot.gate.weight) * (
        B @ A
    )  # (out, in); of an embedding (dim, num)
    if slot.down.start is not None:
        delta = delta - s * (slot.up.start.weight @ slot.down.start.weight)
    transposed = isinstance(layer, nn.Embedding) or not isinstance(layer, nn.Linear)  # Conv1D keeps (in, out)
    W = layer.weight.detach().T if transposed else layer.weight.detach()
    V = W + delta
    if slot.magnitude is not None:
        V = slot.magnitude.weight[:, None] * V / V.detach().norm(dim=1, keepdim=True)
    return (V - W).T if transposed else V - W


def scalings(mixed: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction and what is applied, (batch, seq, layers, experts), token by token."""
    config, n, layers = mixed.xlora_config, len(mixed.xlora_experts), len(mixed.xlora_layers())
    linears = [module for module in mixed.xlora_classifier.layers if isinstance(module, nn.Linear)]
    assert len(linears) == config.xlora_depth
    predicted, given = [], []
    for h in hidden.flatten(0, 1):
        for k, linear in enumerate(linears):
            h = linear.weight @ h
            h = h if linear.bias is None else h + linear.bias
            h = F.relu(h) if config.enable_relu_and_dropout and k + 1 < len(linears) else h
        rows = list(h.split(n)) if config.layerwise_scalings else [h] * layers
        assert len(rows) == layers
        if config.enable_softmax:
            rows = [torch.softmax(row / config.softmax_temperature, 0) for row in rows]
        predicted.append(torch.stack(rows))
        given.append(torch.stack([config.global_scaling_weight * _kept(row, config) for row in rows]))
    shape = (*hidden.shape[:2], layers, n)
    return torch.stack(predicted).view(shape), torch.stack(given).view(shape)


def _kept(row: Tensor, config: xLoRAConfig) -> Tensor:
    chosen = row.argsort(descending=True)[: config.top_k_lora]
    values = torch.softmax(row[chosen], 0) if config.enable_softmax_topk else row[chosen]
    return torch.zeros_like(row).index_put((chosen,), values)


@contextmanager
def dense(base: nn.Module, moved: Mapping[str, Sequence[Tensor | None]], s: Tensor | float) -> Iterator[None]:
    """The layers of the plain model `base` add Σ_i s_i (W_i − W) x, s (batch, seq, layers, experts) or one number."""

    def add(
        module: nn.Module, args: tuple[Tensor], y: Tensor, *, place: int, each: Sequence[Tensor | None]
    ) -> Tensor:
        for k, M in enumerate(each):
            if M is not None:
                if isinstance(module, nn.Embedding):
                    update = F.embedding(args[0], M)
                else:
                    update = args[0] @ (M.T if isinstance(module, nn.Linear) else M)
                y = y + (s if isinstance(s, float) else s[:, :, place, k, None]) * update
        return y

    handles = [
        base.get_submodule(path).register_forward_hook(partial(add, place=place, each=each))
        for place, (path, each) in enumerate(moved.items())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dense_logits(mixed: Any, base: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The logits of the mixture on the plain model `base`, and the prediction."""
    moved, config = changes(mixed), mixed.xlora_config
    value = float(config.scaling_pass_value * config.global_scaling_weight)
    with torch.no_grad(), dense(base, moved, value):
        hidden = base(ids, output_hidden_states=True, **options).hidden_states[-1]  # after the final norm
    predicted, given = scalings(mixed, hidden)
    with dense(base, moved, given):
        return base(ids, **options).logits, predicted


def same_as_dense(mixed: Any, base: Any, ids: Tensor, *, tolerance: float = 1e-9, **options: Any) -> None:
    """Logits, prediction and the gradients of the classifier and of every expert are the oracle's, in float64."""
    mixed, base = mixed.double(), base.double()
    mixed.set_use_trainable_adapters(True)
    router = list(mixed.xlora_classifier.parameters())
    leaves = router + [p for name in mixed.xlora_experts for p in adapter_parameters(mixed, name).values()]
    theirs, predicted = dense_logits(mixed, base, ids, **options)
    mine = mixed(ids, **options).logits
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        mixed.get_latest_scalings(), predicted.detach(), rtol=tolerance, atol=tolerance
    )
    dy = torch.linspace(-1, 1, mine.numel(), dtype=mine.dtype).view_as(mine)
    got, wanted = (
        torch.autograd.grad((logits * dy).sum(), leaves, materialize_grads=True) for logits in (mine, theirs)
    )
    for gradient in wanted[: len(router)]:
        assert gradient.abs().max() > 0
    assert sum(bool(gradient.abs().max() > 0) for gradient in wanted) > 0.9 * len(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=tolerance)
