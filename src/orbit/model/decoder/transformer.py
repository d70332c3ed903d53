"""A decoder of our blocks: Llama's architecture, with windows, normed heads and mixtures of experts as switches.

    h = E[ids]
    h = h + attention(norm(h))        for every block
    h = h + mlp(norm(h))              or MoE
    logits = W · norm(h)              W = E where they are tied

    B batch, T new tokens, S tokens seen (T, and those in the cache), C columns kept, D width, V vocabulary.

Modules have Llama's names (model.layers.0.self_attn.q_proj, …), so its weights load as they are and an adapter that was
trained on one fits the other. Touvron et al. 2023, https://arxiv.org/abs/2302.13971
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.model.attention import KVCache, MultiHeadAttention, RotaryPositionalEmbedding, Rotation
from orbit.model.decoder.config import TransformerConfig
from orbit.model.decoder.generate import generate
from orbit.model.errors import CacheError, MaskError, ShapeError
from orbit.model.experts import Experts
from orbit.model.gate.top_k import TopKGate
from orbit.model.mask import make_packed_mask
from orbit.model.mlp import MLP
from orbit.model.moe import MoE, moe_aux_loss

__all__ = ["Transformer", "TransformerOutput"]

Cache: TypeAlias = "list[KVCache]"
_IGNORED = -100


class TransformerOutput(NamedTuple):
    """What a forward gives.

    Attributes:
        logits: (B, C, V).
        loss: with labels, the mean over supervised tokens, in float32 at least, 0 if there are none; plus `added_loss`.
        added_loss: while a mixture of experts trains, the loss that keeps its experts balanced, weighted; an objective
            that makes its own loss of the logits adds it, as `orbit.objective.CausalLM` does.
    """

    logits: Tensor
    loss: Tensor | None = None
    added_loss: Tensor | None = None


class TransformerBlock(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)): (B, T, D) to (B, T, D)."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c = config
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        assert c.intermediate_size is not None
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps, **made)
        self.self_attn = MultiHeadAttention(
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            head_dim=c.head_dim,
            causal=True,
            window=c.window,
            qk_norm=c.qk_norm,
            bias=c.attention_bias,
            dropout=c.attention_dropout,
            **made,
        )
        for norm in (self.self_attn.q_norm, self.self_attn.k_norm):
            if norm is not None:
                norm.eps = c.norm_eps
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps, **made)
        sizes = c.hidden_size, c.intermediate_size
        self.mlp: MLP | MoE
        if c.num_experts is None:
            self.mlp = MLP(*sizes, activation=c.activation, gated=True, bias=c.mlp_bias, **made)
        else:
            self.mlp = MoE(*sizes, c.num_experts, c.experts_per_token, activation=c.activation, **made)

    def forward(
        self,
        h_BTD: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        seen = self.self_attn(self.input_layernorm(h_BTD), mask=mask, cache=cache, rotation=rotation)
        h_BTD = h_BTD + seen
        x_BTD = self.post_attention_layernorm(h_BTD)
        if isinstance(self.mlp, MoE) and mask is not None and mask.dim() == 2:
            return h_BTD + self.mlp(x_BTD, mask[:, -x_BTD.shape[1] :])  # padding takes no expert's room
        return h_BTD + self.mlp(x_BTD)


class Decoder(nn.Module):
    """Everything below the head: ids (B, T) to hidden states (B, T, D)."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            TransformerBlock(config, device=device, dtype=dtype) for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps, device=device, dtype=dtype)
        self.rope = RotaryPositionalEmbedding(config.head_dim, config.rope_base, scaling=config.rope_scaling)

    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        h_BTD = self.embed_tokens(input_ids)
        if positions is None:
            past = cache[0].length if cache else 0
            positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        rotation = self.rope(positions, h_BTD.dtype)
        for place, block in enumerate(self.layers):
            h_BTD = block(h_BTD, rotation, mask, None if cache is None else cache[place])
        return self.norm(h_BTD)


class Transformer(nn.Module):
    """A causal language model.

    Args:
        config: its sizes and kinds.

    >>> model = Transformer(TransformerConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=4))
    >>> ids = torch.arange(10)[None]
    >>> model(ids).logits.shape, model(ids, labels=ids).loss.shape
    (torch.Size([1, 10, 50]), torch.Size([]))
    >>> model.generate(ids, max_new_tokens=3).shape
    torch.Size([1, 13])

    Raises:
        SettingError: see the blocks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, device=device, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: normal with `init_std`, smaller where the residual stream is written to (GPT-2)."""
        std = self.config.init_std
        narrow = std / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=narrow if name.endswith(("o_proj", "down_proj")) else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, Experts):
                for weight in module.parameters():
                    nn.init.normal_(weight, std=narrow if weight is module.down_proj else std)
            elif isinstance(module, (nn.RMSNorm, TopKGate)):
                module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> TransformerOutput:
        """Logits for the token after each position, and with labels their loss.

        Args:
            input_ids: (B, T) integers.
            attention_mask: (B, S), 0 or False where a token is padding, on either side; also a bool mask as
                `MultiHeadAttention` takes it.
            labels: (B, T) like the ids, not shifted; −100 is not supervised.
            cache: from `make_cache()`; the new tokens are added to it.
            positions: (T,) or (B, T); by default they follow the cache's. Padding on the left needs none.
            position_ids: (B, T), in place of `positions`, as transformers' models take them: without mask and cache a
                new text begins where they do not rise by one, and sees nothing of what stands before it in the row.
            logits_to_keep: logits of the last so many columns, or of these columns; 0 is all.

        Raises:
            ShapeError: ids, labels or the text's length do not fit. MaskError: nor does the mask.
            CacheError: a cache of another model or batch, or one that a failed forward has left half filled.
        """
        self._check(input_ids, labels, cache, logits_to_keep)
        mask = None if attention_mask is None else _as_bool(attention_mask)
        if position_ids is not None:
            if positions is not None or position_ids.shape != input_ids.shape:
                raise ShapeError(
                    f"position_ids {tuple(position_ids.shape)} must be (B, T) like the ids, {tuple(input_ids.shape)}, "
                    "and stand in place of positions"
                )
            positions = position_ids
            if mask is None and cache is None:
                mask = make_packed_mask(position_ids)
        h_BTD = self.model(input_ids, mask, cache, positions)
        if isinstance(logits_to_keep, Tensor):
            h_BTD = h_BTD[:, logits_to_keep]
        elif logits_to_keep:
            h_BTD = h_BTD[:, -logits_to_keep:].contiguous()  # else torch copies a frozen head per row
        logits = (
            F.linear(h_BTD, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(h_BTD)
        )
        loss = None if labels is None else _loss(logits, labels)
        added = self._balance() if self.training and self.config.num_experts is not None else None
        if loss is not None and added is not None:
            loss = loss + added
        return TransformerOutput(logits, loss, added)

    def make_cache(self, max_length: int | None = None) -> Cache:
        """An empty cache of keys and values: grows, or holds `max_length` tokens."""
        return [block.self_attn.make_cache(max_length) for block in self.blocks]

    @property
    def blocks(self) -> list[Any]:
        """The blocks, from the first."""
        return list(self.model.layers)

    generate = generate

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write config.json and model.safetensors, which `from_pretrained` and `orbit chat` read. Adapters are not
        written: `orbit.adapter.save` does that. Under FSDP2 every rank must call it, and the first one writes.

        Raises:
            WeightsError: the model is on the meta device. OSError: from the file system.
        """
        from orbit.model.decoder.folder import save_folder

        return save_folder(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Transformer:
        """The model in a folder, of `save_pretrained` or of a Llama (`TransformerConfig.from_llama`), in eval mode.

        Args:
            folder: with config.json and safetensors.
            dtype: default: as stored.

        Raises:
            SettingError: another architecture, or a setting that would be lost. WeightsError: weights that are damaged
            or do not fit. OSError: from the file system.
        """
        from orbit.model.decoder.folder import load_folder

        return load_folder(folder, device=device, dtype=dtype)

    # What tools for transformers' models ask for: which part is the body, and which layers read and write tokens.

    @property
    def base_model(self) -> Decoder:
        """Everything below the head."""
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        """What reads tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """What writes logits; the embedding where they are tied."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def _balance(self) -> Tensor:
        """The experts' load-balancing loss, weighted, as a mean over the blocks."""
        return moe_aux_loss(self.model, balance=self.config.balance_weight / self.config.num_layers)

    def _check(
        self, input_ids: Tensor, labels: Tensor | None, cache: Cache | None, logits_to_keep: int | Tensor
    ) -> None:
        if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ShapeError(
                f"input_ids of shape {tuple(input_ids.shape)} and {input_ids.dtype}: integers (B, T) are needed"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise ShapeError(
                f"labels {tuple(labels.shape)} must have the shape of input_ids {tuple(input_ids.shape)}"
            )
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ShapeError("a loss needs the logits of all columns: leave out labels or logits_to_keep")
        if not isinstance(logits_to_keep, Tensor) and logits_to_keep < 0:
            raise ShapeError(f"logits_to_keep {logits_to_keep} keeps no columns: 0 is all, 1 the last")
        if cache is not None and len(cache) != self.config.num_layers:
            raise CacheError(
                f"the cache has {len(cache)} layers and the model {self.config.num_layers}: make it with make_cache()"
            )
        # A compiled graph would be made anew for every length if it compared them.
        if cache and not torch.compiler.is_compiling() and len({layer.length for layer in cache}) > 1:
            lengths = [layer.length for layer in cache]
            raise CacheError(
                f"the cache's layers hold {lengths} tokens: an earlier forward ended halfway. Crop each to "
                f"{min(lengths)}, or begin with a new cache"
            )
        length, limit = (cache[0].length if cache else 0) + input_ids.shape[1], self.config.max_length
        if limit is not None and length > limit:
            raise ShapeError(
                f"a text of {length} tokens exceeds max_length {limit}: cut it, or build with a larger max_length"
            )


def transformer(
    *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **settings: Any
) -> Transformer:
    """A `Transformer` from the settings of its config."""
    return Transformer(TransformerConfig(**settings), device=device, dtype=dtype)


def _as_bool(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.dim() != 2:
        raise MaskError(
            f"attention_mask of shape {tuple(mask.shape)} and {mask.dtype}: 1 for tokens and 0 for padding (B, S), or "
            "a bool mask, True = attend"
        )
    return mask != 0


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the supervised tokens, each predicted by the position before it."""
    target = labels_BT[:, 1:].flatten()
    logits = logits_BTV[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, target, ignore_index=_IGNORED, reduction="sum")
    return total / (target != _IGNORED).sum().clamp(min=1)
