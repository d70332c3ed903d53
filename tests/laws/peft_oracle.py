"""PEFT and dense weights as two independent oracles: the table kind × variant, without any of our own code.

A kind is a tiny model with one layer to adapt; a variant is a setting of PEFT's LoraConfig. For each cell

    peft_cell(kind, variant)   PEFT's model with trained-looking factors, or why PEFT refuses the cell
    dense_output(...)          the bare model run on W' written out from the definition, by functional_call

and the cell says how far the two are apart, so that a law knows where PEFT may be believed.

    W' = W + ΔW,   ΔW = g·s·B·A in the layout of W,   DoRA: W' = m∘V/‖V‖ with V = W + ΔW, the norm detached

    layout          W                    A               B                m, and the axes that ‖V‖ sums over
    linear          (out, in)            (r, in)         (out, r)         (out,)   1
    conv1d          (in, out)            (r, in)         (out, r)         (out,)   0        ΔW = s·(B·A)ᵀ
    embedding       (vocab, dim)         (r, vocab)      (dim, r)         (dim,)   0        ΔW = s·(B·A)ᵀ
    conv            (out, in/groups, *k) (r, in/groups, *k) (out, r, 1…)  (out,)   all but 0
    experts         (E, out, in)         (E·r, in)       (out, r·E)       none
    experts, other  (E, in, out)         (E·r, in)       (out, r·E)       none

Experts keep expert e's A in the rows e·r … e·r+r−1, but its B in the columns e, E+e, 2E+e, …: that is how PEFT
writes them. A grouped convolution is where PEFT has another definition (its A sees all `in` channels), whose
ΔW is (out, in, *k) and fits no weight of the layer: `full_weight` writes it out for a layer without groups.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

R, ALPHA = 4, 6  # even (orthogonal asks for it) and divisible by the groups
TOLERANCE = 1e-5  # of float32; PEFT's cell is called right below it


@dataclass(frozen=True)
class Kind:
    """A tiny model with layers of one kind.

    Attributes:
        build: makes the model; called under a fixed seed.
        inputs: makes the inputs in float32 or int64; called under a fixed seed.
        target: the dotted name of the layer to adapt.
        weights: the full name of each adapted weight, and its layout (the module's table).
        parameters: the names of the layer's parameters that `target_parameters` adapts; empty for a module.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    weights: Mapping[str, str]
    target: str = "layer"
    parameters: tuple[str, ...] = ()

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model, equal at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return self.build().to(dtype)

    def batch(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Its inputs, equal at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs())


@dataclass(frozen=True)
class Variant:
    """A setting; `fields` are PEFT's, None where PEFT has no such variant."""

    fields: Mapping[str, Any] | None
    dora: bool = False
    rslora: bool = False
    gated: bool = False
    lora_bias: bool = False
    init: str = "kaiming"

    def scale(self, r: int = R, alpha: float = ALPHA) -> float:
        """s."""
        return alpha / math.sqrt(r) if self.rslora else alpha / r


@dataclass
class Factors:
    """The tensors of one adapted weight, leaves of autograd."""

    A: Tensor
    B: Tensor
    m: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that the variant has, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Skip:
    """PEFT has no such cell."""

    reason: str


@dataclass(frozen=True)
class Cell:
    """PEFT's model of a cell.

    Attributes:
        model: the PeftModel, adapter "default" active, in eval mode, its factors set to seeded values (for the
            inits pissa, olora and orthogonal: as PEFT made them).
        factors: the live tensors by the weight they adapt, in PEFT's shapes.
        output_error: max |y − dense y| / max |dense y|.
        gradient_error: the worst ‖g − dense g‖ / ‖dense g‖ over the factors.
        wrong: in words, where an error exceeds TOLERANCE or PEFT ignored the init; None where PEFT is right.
        warnings: what PEFT said while the cell was built.
    """

    model: Any
    factors: dict[str, Factors]
    output_error: float
    gradient_error: float
    wrong: str | None
    warnings: tuple[str, ...] = field(default=())


# -- kinds ---------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """before → GELU → layer → GELU → after, with the layer named `layer`."""

    def __init__(self, before: nn.Module, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y = self.layer(F.gelu(x) if x.is_floating_point() else x)
        return self.after(F.gelu(y))


class Attends(nn.Module):
    """Self-attention as a model calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.normal_(self.layer.in_proj_bias, std=0.1)
        nn.init.normal_(self.layer.out_proj.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.before(x))
        return self.after(self.layer(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Two experts a token by fixed routing; every expert is hit. E = 3, in = 6, hidden = 5, out = 6."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = transposed  # as transformers names it: weights are (E, in, out)
        up, down = torch.randn(3, 5, 6) / 3, torch.randn(3, 6, 5) / 3
        self.up = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down = nn.Parameter(down.mT.contiguous() if transposed else down)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(3):
            rows = [row for row in range(len(x)) if expert in (row % 3, (row + 1) % 3)]
            up, down = self.up[expert], self.down[expert]
            if self.is_transposed:
                up, down = up.T, down.T
            out = out.index_add(0, torch.tensor(rows), F.linear(F.silu(F.linear(x[rows], up)), down))
        return out


def mixtral() -> nn.Module:
    """A real MixtralForCausalLM of one layer; its experts are 3-D Parameters in transformers 5."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,  # grouped_mm asks for rows of a multiple of 16 bytes
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
            max_position_embeddings=16,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.3,
        )
    ).eval()


def hf_conv1d(out: int, into: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out, into)
    nn.init.normal_(layer.weight, std=0.3)
    nn.init.normal_(layer.bias, std=0.1)
    return layer


def _linear(layer: Callable[[], nn.Module], layout: str = "linear") -> Kind:
    return Kind(
        lambda: Around(nn.Linear(5, 7), layer(), nn.Linear(6, 3)),
        lambda: (torch.randn(4, 3, 5),),
        {"layer.weight": layout},
    )


def _embedding(**options: Any) -> Kind:
    return Kind(
        lambda: Around(nn.Identity(), nn.Embedding(9, 6, **options), nn.Linear(6, 3)),
        lambda: (torch.tensor([[1, 2, 2, 8], [0, 3, 1, 1], [5, 0, 7, 2]]),),
        {"layer.weight": "embedding"},
    )


def _conv(cls: type[nn.Module], size: tuple[int, ...], **options: Any) -> Kind:
    """4 → 6 channels between 1×1 convolutions."""
    return Kind(
        lambda: Around(cls(2, 4, 1), cls(4, 6, 3, **options), cls(6, 3, 1)),
        lambda: (torch.randn(4, 2, *size),),
        {"layer.weight": "conv"},
    )


def _experts(transposed: bool) -> Kind:
    return Kind(
        lambda: Around(nn.Linear(5, 6), Experts(transposed), nn.Linear(6, 3)),
        lambda: (torch.randn(7, 5),),
        {f"layer.{name}": "experts, other" if transposed else "experts" for name in ("up", "down")},
        parameters=("up", "down"),
    )


_MIXTRAL = "model.layers.0.mlp.experts"
KINDS: dict[str, Kind] = {
    "Linear": _linear(lambda: nn.Linear(7, 6)),
    "Linear without bias": _linear(lambda: nn.Linear(7, 6, bias=False)),
    "Conv1D": _linear(lambda: hf_conv1d(6, 7), "conv1d"),
    "Embedding": _embedding(),
    "Embedding with padding_idx": _embedding(padding_idx=2),
    "Embedding with scale_grad_by_freq": _embedding(padding_idx=2, scale_grad_by_freq=True),
    "Conv1d": _conv(nn.Conv1d, (9,)),
    "Conv1d with padding='same'": _conv(nn.Conv1d, (9,), padding="same", bias=False),
    "Conv1d with dilation and padding='same'": _conv(nn.Conv1d, (9,), padding="same", dilation=2),
    "Conv2d with stride and padding": _conv(nn.Conv2d, (7, 6), stride=2, padding=1),
    "Conv2d with dilation": _conv(nn.Conv2d, (7, 6), dilation=2, padding=2),
    "Conv2d with circular padding": _conv(nn.Conv2d, (7, 6), padding=1, padding_mode="circular"),
    "Conv2d with groups": _conv(nn.Conv2d, (7, 6), groups=2, padding=1),
    "Conv3d": _conv(nn.Conv3d, (4, 5, 4), padding=1),
    "MultiheadAttention": Kind(
        Attends,
        lambda: (torch.randn(4, 5, 6),),
        {"layer.in_proj_weight": "linear", "layer.out_proj.weight": "linear"},
    ),
    "Experts": _experts(False),
    "Experts stored (in, out)": _experts(True),
    "Mixtral's experts": Kind(
        mixtral,
        lambda: (torch.randint(0, 16, (3, 7)),),
        {f"{_MIXTRAL}.{name}": "experts" for name in ("gate_up_proj", "down_proj")},
        target=_MIXTRAL,
        parameters=("gate_up_proj", "down_proj"),
    ),
}

VARIANTS: dict[str, Variant] = {
    "LoRA": Variant({}),
    "rsLoRA": Variant({"use_rslora": True}, rslora=True),
    "DoRA": Variant({"use_dora": True}, dora=True),
    "rsDoRA": Variant({"use_rslora": True, "use_dora": True}, dora=True, rslora=True),
    "gated": Variant(None, gated=True),
    "gated DoRA": Variant(None, gated=True, dora=True),
    "LoRA with bias": Variant({"lora_bias": True}, lora_bias=True),
    "gaussian": Variant({"init_lora_weights": "gaussian"}, init="gaussian"),
    "orthogonal": Variant({"init_lora_weights": "orthogonal"}, init="orthogonal"),
    "pissa": Variant({"init_lora_weights": "pissa"}, init="pissa"),
    "olora": Variant({"init_lora_weights": "olora"}, init="olora"),
}

# -- the dense oracle ----------------------------------------------------------------------------------------


def dense_delta(layout: str, shape: torch.Size, A: Tensor, B: Tensor, s: float) -> Tensor:
    """ΔW = s·B·A in the layout and shape of the weight; see the module's table."""
    if layout == "linear":
        return s * (B @ A)
    if layout in ("conv1d", "embedding"):
        return s * (B @ A).T
    if layout == "conv":
        return s * (B.flatten(1) @ A.flatten(1)).view(shape)
    experts = shape[0]
    A_Eri, B_Eor = A.view(experts, -1, A.shape[1]), B.view(len(B), -1, experts).permute(2, 0, 1)
    delta = s * torch.bmm(B_Eor, A_Eri)
    return delta if layout == "experts" else delta.mT


def dense_weight(layout: str, weight: Tensor, factors: Factors, s: float) -> Tensor:
    """W' from its definition, differentiable in the factors, with DoRA's norm detached."""
    shape = weight.shape
    delta = dense_delta(layout, shape, factors.A, factors.B, s)
    V = weight + (delta if factors.gate is None else factors.gate * delta)
    if factors.m is None:
        return V
    kept = 1 if layout in ("conv1d", "embedding") else 0
    axes = [axis for axis in range(V.dim()) if axis != kept]
    norm = V.square().sum(axes, keepdim=True).sqrt().detach()
    return factors.m.view([-1 if axis == kept else 1 for axis in range(V.dim())]) * V / norm


def full_weight(weight: Tensor, groups: int) -> Tensor:
    """The weight (out, in, *k) of the convolution without groups that computes the same as (out, in/groups, *k)."""
    out, width = len(weight) // groups, weight.shape[1]
    full = weight.new_zeros(len(weight), width * groups, *weight.shape[2:])
    for g in range(groups):
        full[g * out : (g + 1) * out, g * width : (g + 1) * width] = weight[g * out : (g + 1) * out]
    return full


def dense_output(kind: str, variant: str, model: nn.Module, factors: Mapping[str, Factors]) -> Tensor:
    """The output of the bare `model` on `kind`'s batch with each adapted weight replaced by W'.

    Differentiable in the factors. Model and factors are of one dtype.
    """
    s, row = VARIANTS[variant].scale(), KINDS[kind]
    if VARIANTS[variant].lora_bias:
        model = copy.deepcopy(model)
        for name in row.weights:
            layer = model.get_submodule(name.rpartition(".")[0])
            if getattr(layer, "bias", "absent") is None:
                layer.bias = nn.Parameter(factors[name].A.new_zeros(factors[name].B.shape[0]))
    own = dict(model.named_parameters())
    changed = {}
    for name, layout in row.weights.items():
        changed[name] = dense_weight(layout, own[name].detach(), factors[name], s)
        extra = factors[name].bias
        if extra is not None:
            bias = name.removesuffix("weight") + "bias"
            changed[bias] = own[bias].detach() + s * extra
    dtype = next(iter(changed.values())).dtype
    return result(functional_call(model, changed, row.batch(dtype)))


def result(output: Any) -> Tensor:
    """The tensor that a kind's model returns."""
    return output.logits if hasattr(output, "logits") else output


def random_factors(
    kind: str, variant: str, dtype: torch.dtype = torch.float32, seed: int = 5
) -> dict[str, Factors]:
    """Seeded leaves for every adapted weight of the kind, in our shapes, of a size that training could reach.

    An embedding's A is 0 at padding_idx, which no gradient reaches.
    """
    model, row, setting = KINDS[kind].make(dtype), KINDS[kind], VARIANTS[variant]
    draw = torch.Generator().manual_seed(seed)

    def leaf(*shape: int, mean: float = 0.0, std: float = 0.3) -> Tensor:
        value = torch.randn(shape, generator=draw) * std + mean
        return value.to(dtype).requires_grad_()

    if row.parameters and (setting.dora or setting.lora_bias):
        raise ValueError(f"{kind}: 3-D parameters have neither DoRA nor a bias")
    found = {}
    for name, layout in row.weights.items():
        weight = model.get_parameter(name)
        layer = model.get_submodule(name.rpartition(".")[0])
        shape = tuple(weight.shape)
        A, B, out = {
            "linear": lambda s: ((R, s[1]), (s[0], R), s[0]),
            "conv1d": lambda s: ((R, s[0]), (s[1], R), s[1]),
            "embedding": lambda s: ((R, s[0]), (s[1], R), s[1]),
            "conv": lambda s: ((R, *s[1:]), (s[0], R, *(1 for _ in s[2:])), s[0]),
            "experts": lambda s: ((s[0] * R, s[2]), (s[1], R * s[0]), s[1]),
            "experts, other": lambda s: ((s[0] * R, s[1]), (s[2], R * s[0]), s[2]),
        }[layout](shape)
        found[name] = Factors(leaf(*A), leaf(*B))
        padding = getattr(layer, "padding_idx", None)
        if padding is not None:
            with torch.no_grad():
                found[name].A[:, padding] = 0
        if setting.dora:
            found[name].m = leaf(out, mean=1.0)
        if setting.lora_bias:
            found[name].bias = leaf(out)
        if setting.gated:
            found[name].gate = leaf(mean=0.7, std=0.1)
    return found


# -- PEFT ----------------------------------------------------------------------------------------------------


def peft_config(kind: str, variant: str, **changes: Any) -> Any:
    """PEFT's LoraConfig of a cell."""
    from peft import LoraConfig

    row, fields = KINDS[kind], VARIANTS[variant].fields
    if fields is None:
        raise ValueError(f"PEFT has no variant {variant!r}")
    where: dict[str, Any] = {"target_modules": [row.target]}
    if row.parameters:
        names = [f"{row.target}.{name}" for name in row.parameters]
        where = {"target_modules": [], "target_parameters": names}
    return LoraConfig(**{"r": R, "lora_alpha": ALPHA, **where, **fields, **changes})


def peft_factors(model: Any, kind: str) -> dict[str, Factors]:
    """The live tensors of adapter "default" in a PeftModel, by the weight that they adapt."""
    row = KINDS[kind]
    layer, found = model.base_model.model.get_submodule(row.target), {}
    if row.parameters:
        while hasattr(layer, "parameter_name"):  # one wrapper a parameter, the last one named outermost
            found[f"{row.target}.{layer.parameter_name}"] = _factors_of(layer)
            layer = layer.base_layer
    elif isinstance(layer.base_layer, nn.MultiheadAttention):
        found[f"{row.target}.in_proj_weight"] = _factors_of(layer)
        found[f"{row.target}.out_proj.weight"] = _factors_of(layer.base_layer.out_proj)
    else:
        found[f"{row.target}.weight"] = _factors_of(layer)
    return {name: found[name] for name in row.weights}


def _factors_of(layer: Any) -> Factors:
    if "default" in layer.lora_embedding_A:
        factors = Factors(layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
    else:
        B = layer.lora_B["default"]
        factors = Factors(layer.lora_A["default"].weight, B.weight, bias=B.bias)
    if "default" in layer.lora_magnitude_vector:
        factors.m = layer.lora_magnitude_vector["default"].weight
    return factors


def peft_cell(kind: str, variant: str, dtype: torch.dtype = torch.float32) -> Cell | Skip:
    """Build PEFT's model of the cell, run it forward and backward, and compare it with the dense oracle.

    PEFT is asked by trying: whatever it raises on the way is the reason of the Skip.
    """
    setting = VARIANTS[variant]
    if setting.fields is None:
        return Skip(f"PEFT has no variant {variant!r}")
    from peft import get_peft_model

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            try:
                model = get_peft_model(KINDS[kind].make(dtype), peft_config(kind, variant)).eval()
                factors = peft_factors(model, kind)
                ignored = _ignored(variant, KINDS[kind].make(dtype), factors, KINDS[kind].weights)
                if setting.init not in ("pissa", "olora", "orthogonal"):
                    _fill(kind, variant, dtype, factors)
                y = result(model(*KINDS[kind].batch(dtype)))
                gradients = _gradients(y, factors)
            except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
                return Skip(f"{type(error).__name__}: {error}")
    output_error, gradient_error = _errors(kind, variant, model, factors, y, gradients)
    problems = [ignored] if ignored else []
    if not output_error <= TOLERANCE:
        problems.append(f"output off by {output_error:.2g}")
    if not gradient_error <= TOLERANCE:
        problems.append(f"gradient off by {gradient_error:.2g}")
    told = tuple(dict.fromkeys(str(warning.message) for warning in said))
    return Cell(model, factors, output_error, gradient_error, "; ".join(problems) or None, told)


def bare_base(model: Any, kind: str) -> nn.Module:
    """The base model inside a PeftModel, with its weights as they are now (pissa and olora change them)."""
    from peft.utils.save_and_load import get_base_model_state_dict

    bare = KINDS[kind].make(next(model.parameters()).dtype)
    bare.load_state_dict(get_base_model_state_dict(model))
    return bare.eval()


def _fill(kind: str, variant: str, dtype: torch.dtype, factors: Mapping[str, Factors]) -> None:
    """Seeded values into PEFT's tensors. Where the shapes differ from ours (groups), values of PEFT's shape."""
    draw = torch.Generator().manual_seed(6)
    for name, ours in random_factors(kind, variant, dtype).items():
        theirs = factors[name].tensors()
        if set(theirs) != set(ours.tensors()):
            raise RuntimeError(
                f"PEFT's {name} has {sorted(theirs)} where {sorted(ours.tensors())} were asked for"
            )
        for part, tensor in theirs.items():
            value = ours.tensors()[part].detach()
            if value.numel() != tensor.numel():
                value = torch.randn(tensor.shape, generator=draw).to(dtype) * 0.3
            with torch.no_grad():
                tensor.copy_(value.view(tensor.shape))


def _gradients(y: Tensor, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    leaves = {f"{name} {p}": t for name, group in factors.items() for p, t in group.tensors().items()}
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    found = torch.autograd.grad((y * wanted).sum(), list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)
    }


def _errors(
    kind: str,
    variant: str,
    model: Any,
    factors: Mapping[str, Factors],
    y: Tensor,
    gradients: Mapping[str, Tensor],
) -> tuple[float, float]:
    bare = bare_base(model, kind)
    leaves = {
        name: Factors(**{p: t.detach().clone().requires_grad_() for p, t in group.tensors().items()})
        for name, group in factors.items()
    }
    used: Mapping[str, Factors] = leaves
    layer: Any = bare.get_submodule(KINDS[kind].target)
    groups = getattr(layer, "groups", 1)
    if groups > 1:  # PEFT's ΔW fits the layer without groups only
        layer.weight, layer.groups = nn.Parameter(full_weight(layer.weight.detach(), groups)), 1
        used = {name: replace(group, B=full_weight(group.B, groups)) for name, group in leaves.items()}
    dense = dense_output(kind, variant, bare, used)
    worst = 0.0
    for name, true in _gradients(dense, leaves).items():
        error, size = (gradients[name] - true).norm(), true.norm()
        worst = max(worst, float(error / size) if size else float(error))
    return float(((y - dense).abs().max() / dense.abs().max()).detach()), worst


def _ignored(
    variant: str, bare: nn.Module, factors: Mapping[str, Factors], layouts: Mapping[str, str]
) -> str | None:
    """Whether factors that PEFT made are not those of the init that was asked for."""
    setting = VARIANTS[variant]
    for name, group in factors.items():
        weight, A, B = bare.get_parameter(name).detach(), group.A.detach(), group.B.detach()
        if setting.init == "gaussian":
            done = not B.any() and 0.5 < float(A.std()) * R < 2.0
        elif setting.init == "orthogonal":
            done = bool(A.any() and B.any() and (B @ A).abs().max() < 1e-5)
        elif setting.init in ("pissa", "olora"):
            wanted = low_rank(setting.init, weight.T if layouts[name] == "conv1d" else weight)
            done = wanted.shape == (len(B), A.shape[1]) and torch.allclose(
                setting.scale() * B @ A, wanted, atol=1e-5
            )
        else:
            return None
        if not done:
            return f"init {setting.init!r} ignored"
    return None


def low_rank(init: str, weight: Tensor, r: int = R) -> Tensor:
    """The part of a weight (out, in) that pissa or olora moves into s·B·A, leaving the rest as the base.

    pissa: the r largest singular directions, B = U√(Σ/s), A = √(Σ/s)Vᵀ. olora: W = QR, B·A = Q[:, :r]·R[:r]
    with B = Q[:, :r] and A = R[:r]; the base keeps W − s·B·A, so s scales what is moved.
    """
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :r] * S[:r] @ Vh[:r]
    Q, upper = torch.linalg.qr(weight)
    return (ALPHA / r) * Q[:, :r] @ upper[:r]


def _main() -> None:
    """Print the table: python -m tests.laws.peft_oracle"""
    for kind in KINDS:
        for variant in VARIANTS:
            cell = peft_cell(kind, variant)
            if isinstance(cell, Skip):
                print(f"{kind} | {variant} | skip | {cell.reason}")
            else:
                errors = f"output {cell.output_error:.1e}, gradient {cell.gradient_error:.1e}"
                print(f"{kind} | {variant} | {'wrong' if cell.wrong else 'right'} | {cell.wrong or errors}")


if __name__ == "__main__":
    _main()
