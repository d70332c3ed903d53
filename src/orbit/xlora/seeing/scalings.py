"""What a router did with a text: the scalings of every token, layer and expert, to look at and to draw.

s = Scalings.of(model, "When did Ghana become independent?", tokenizer)
s.winner                    'facts', the expert with the largest mean
s.plot("heatmap.html")      token × layer, one panel an expert; .png, .svg and .pdf by matplotlib

H = −Σ q ln q, q = s/Σs         the entropy of a token and layer, in nats: 0 is one expert, ln n all alike

values (seq, layers, experts)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orbit.core.modes import evaluating
from orbit.xlora.classifier import applied
from orbit.xlora.errors import XLoRAError
from orbit.xlora.model import xLoRAModel
from orbit.xlora.passes import forward


@dataclass(frozen=True, eq=False)
class Scalings:
    """The scalings of one text.

    Those that a forward left behind are seen with
    `Scalings(model.get_latest_scalings()[row], model.xlora_experts, tuple(model.xlora_layers()), tokens)`.

    Attributes:
        values: (seq, layers, experts), kept as float32 on the CPU.
        experts: names along the last axis.
        layers: dotted names along the second.
        tokens: the text of every token.

    Raises:
        XLoRAError: a name too many or too few, or a value that is not finite.

    >>> s = Scalings(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]), ("law", "art"), ("0.q_proj",), ("Good", " day"))
    >>> s.winner, s.mean, s.entropy().mean(1)
    ('law', tensor([0.7000, 0.3000]), tensor([0.3251, 0.6931]))
    """

    values: Tensor
    experts: tuple[str, ...]
    layers: tuple[str, ...]
    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("experts", "layers", "tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        wanted = len(self.tokens), len(self.layers), len(self.experts)
        if tuple(self.values.shape) != wanted or 0 in wanted:
            raise XLoRAError(
                f"scalings of shape {tuple(self.values.shape)} for {wanted[0]} tokens, {wanted[1]} layers and "
                f"{wanted[2]} experts: they must be (seq, layers, experts) of one text, with a name for each"
            )
        if not torch.isfinite(self.values).all():
            raise XLoRAError(
                "scalings hold NaN or infinity: look at the classifier's weights and learning rate"
            )
        object.__setattr__(self, "values", self.values.detach().float().cpu())

    @classmethod
    def of(
        cls,
        model: nn.Module,
        text: str | Sequence[int] | Tensor,
        tokenizer: Any = None,
        *,
        as_applied: bool = False,
    ) -> Scalings:
        """The scalings of a text, by the scaling pass and the classifier alone, without dropout.

        Nothing is left behind: no gradient, no line in the log, and the model's modes are as they were.

        Args:
            model: a mixture.
            text: or its token ids, (seq,) or (1, seq).
            tokenizer: of transformers. With ids it may be left out; the tokens are then called by their numbers.
            as_applied: what the layers are given, after top-k and the global weight, in place of the prediction.

        Raises:
            XLoRAError: no mixture, a text without a tokenizer, no token, or several texts.
        """
        mixture = _mixture(model)
        if isinstance(text, str):
            if tokenizer is None:
                raise XLoRAError(
                    "Scalings.of was given a text and no tokenizer: Scalings.of(model, text, tokenizer)"
                )
            text = tokenizer(text)["input_ids"]
        ids = torch.as_tensor(text, dtype=torch.long)
        ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
        if ids.dim() != 1 or not len(ids):
            raise XLoRAError(
                f"Scalings.of looks at one text of at least one token, got ids of shape {tuple(ids.shape)}"
            )
        prediction = predict(mixture, {"input_ids": ids[None]})
        if as_applied:
            prediction = applied(prediction, mixture.xlora_config)
        numbers = ids.tolist()
        # One by one, so that what a token adds is seen, its space or line break included.
        tokens = (
            map(str, numbers) if tokenizer is None else (tokenizer.decode([number]) for number in numbers)
        )
        return cls(prediction[0], mixture.xlora_experts, tuple(mixture.xlora_layers()), tuple(tokens))

    @property
    def mean(self) -> Tensor:
        """(experts,): the means over tokens and layers."""
        return self.values.mean((0, 1))

    @property
    def winner(self) -> str:
        """The expert with the largest mean; of several alike the first."""
        return self.experts[int(self.mean.argmax())]

    def entropy(self, normalised: bool = False) -> Tensor:
        """H (seq, layers); `.mean(1)` is that of a token, `.mean(0)` that of a layer, `.mean()` of the text.

        Raises:
            XLoRAError: as `entropy`, the function.
        """
        return entropy(self.values, normalised)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw token × layer, one panel an expert, on one colour scale. The suffix says how.

        `.html` is a page that needs nothing else, neither network nor matplotlib, and names what the mouse is on. All
        others are matplotlib's (.png, .svg, .pdf). Folders are made.

        Raises:
            MissingExtraError: matplotlib is not installed. XLoRAError: a suffix that matplotlib does not write.
        """
        from orbit.xlora.seeing import page, picture

        path = Path(path)
        write = page.write if path.suffix.lower() in (".html", ".htm") else picture.write
        write(self, path)
        return path


def entropy(scalings: Tensor, normalised: bool = False) -> Tensor:
    """H of scalings (..., experts) over their last axis, (...) in nats, or from 0 to 1 if `normalised` (by ln n).

    Where all scalings are 0 it is 0, and with one expert too.

    Raises:
        XLoRAError: a negative scaling, which no share can be.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0], [2.0, 0.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    if (scalings < 0).any():
        raise XLoRAError(
            f"a scaling is {float(scalings.min()):.3g}, and entropy is of shares: it needs scalings of a softmax, "
            "which xLoRAConfig(enable_softmax=True) gives"
        )
    wide = scalings.to(torch.promote_types(scalings.dtype, torch.float32))
    total = wide.sum(-1, keepdim=True)
    shares = wide / torch.where(total > 0, total, 1.0)
    nats = torch.special.entr(shares).sum(-1)
    return nats / math.log(scalings.shape[-1]) if normalised and scalings.shape[-1] > 1 else nats


def predict(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The prediction (batch, seq, layers, experts) for a forward's inputs, in evaluation mode and without gradient.

    Args:
        inputs: "input_ids" (batch, seq), and what else the model's forward takes; moved to the model's device.

    Raises:
        XLoRAError: no mixture.
    """
    mixture = _mixture(model)
    device = next(mixture.parameters()).device
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with evaluating(mixture), torch.no_grad():
        return forward.predict(mixture, given, None)


def _mixture(model: nn.Module) -> xLoRAModel:
    if not isinstance(model, xLoRAModel):
        raise XLoRAError(f"{type(model).__name__} is no mixture: make it one with add_xlora_to_model")
    return model
