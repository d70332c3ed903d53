"""Muon: a reference step in numpy, torch's own optimizers apart, stacks and kernels, and what goes where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orbit.core import param_groups
from orbit.engine import Engine
from orbit.optim import Muon
from orbit.plugin import LoRA
from tests import tiny


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=made) for _ in range(steps)]


def step(optimizer: torch.optim.Optimizer, p: nn.Parameter, gradient: Tensor) -> None:
    p.grad = gradient.clone()
    optimizer.step()


# ── the equations ─────────────────────────────────────────────────────────────────────────────────────────────


def numpy_muon(w: np.ndarray, grads: list[np.ndarray], lr: float, decay: float, ratio: float) -> np.ndarray:
    """The update of one matrix as the module's docstring has it, in double precision."""
    a, b, c = 3.4445, -4.7750, 2.0315
    momentum, mu = np.zeros_like(w), 0.95
    for g in grads:
        momentum = mu * momentum + (1 - mu) * g
        update = (1 - mu) * g + mu * momentum
        x = update.T if len(w) > len(w.T) else update
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        x = x.T if len(w) > len(w.T) else x
        w = w - lr * decay * w - lr * ratio * x
    return w


@pytest.mark.parametrize(
    ("adjust", "ratio"),
    [
        ("original", lambda m, n: max(1, m / n) ** 0.5),
        ("match_rms_adamw", lambda m, n: 0.2 * max(m, n) ** 0.5),
    ],
)
@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (3, 5, 4), (2, 8, 8)])
def test_it_is_the_reference_in_numpy(shape: tuple[int, ...], adjust: str, ratio: Any) -> None:
    """Newton-Schulz runs in bfloat16, so to two digits of the change."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    p = nn.Parameter(start.clone())
    optimizer = Muon([{"params": [p], "use_muon": True}], lr=0.1, weight_decay=0.3, adjust_lr_fn=adjust)
    grads = gradients(shape, 3)
    for gradient in grads:
        step(optimizer, p, gradient)
    wanted = np.stack(
        [
            numpy_muon(w, list(g), 0.1, 0.3, ratio(*shape[-2:]))
            for w, g in zip(
                start.double().reshape(-1, *shape[-2:]).numpy(),
                np.stack([g.double().reshape(-1, *shape[-2:]).numpy() for g in grads], 1),
                strict=True,
            )
        ]
    ).reshape(shape)
    change, expected = p.detach().double().numpy() - start.numpy(), wanted - start.double().numpy()
    assert np.linalg.norm(change - expected) <= 0.02 * np.linalg.norm(expected)


def test_it_is_torchs_muon_and_torchs_adamw_to_the_last_bit() -> None:
    ours, theirs = tiny.model(), tiny.model()
    optimizer = Muon.for_model(ours, lr=0.02, adamw_lr=3e-3, adamw_weight_decay=0.1, nesterov=False)
    matrix, *rest = theirs.parameters()
    parts = [
        torch.optim.Muon([matrix], lr=0.02, nesterov=False),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    x, y = tiny.dataset(16).tensors
    for seed in range(4):
        for model, optimizers in ((ours, [optimizer]), (theirs, parts)):
            torch.manual_seed(seed)
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            for part in optimizers:
                part.step()
    assert tiny.same(ours, theirs)


def test_a_stack_is_its_matrices() -> None:
    """As torch's Muon steps each by itself, to the rounding of bfloat16."""
    stack = nn.Parameter(torch.randn(3, 6, 4))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    before = stack.detach().clone()
    optimizer = Muon([{"params": [stack], "use_muon": True}], lr=0.05)
    others = [torch.optim.Muon([p], lr=0.05) for p in alone]
    for gradient in gradients((3, 6, 4), 3):
        step(optimizer, stack, gradient)
        for other, p, part in zip(others, alone, gradient, strict=True):
            step(other, p, part)
    wanted = torch.stack([p.detach() for p in alone])
    assert (stack.detach() - wanted).norm() <= 0.01 * (wanted - before).norm()


def test_kernels_are_matrices_of_their_filters() -> None:
    kernel = nn.Parameter(torch.randn(8, 3, 2, 2))
    flat = nn.Parameter(kernel.detach().flatten(1).clone())
    before = flat.detach().clone()
    optimizer = Muon([{"params": [kernel], "use_muon": True, "flatten": True}], lr=0.05)
    other = torch.optim.Muon([flat], lr=0.05)
    for gradient in gradients((8, 3, 2, 2), 3):
        step(optimizer, kernel, gradient)
        step(other, flat, gradient.flatten(1))
    assert (kernel.detach().flatten(1) - flat.detach()).norm() <= 0.01 * (flat.detach() - before).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.ModuleList([nn.Linear(4, 4, dtype=dtype)])
    model.experts = nn.Parameter(torch.randn(2, 3, 4, dtype=dtype))
    optimizer = Muon.for_model(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(p.isfinite().all() and p.dtype == dtype for p in model.parameters())


# ── in a run ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_adapters_join_the_group_of_their_weight_and_vectors_adamws() -> None:
    """A plugin freezes the base after the optimizer was made; the magnitudes of DoRA are no matrices."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(16, 3))
    optimizer = Muon.for_model(model, lr=0.02, adamw_lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    engine = Engine(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        schedule,
        [LoRA(target_names=["0", "1", "3"], dora=True, r=2, alpha=4)],
        device="cpu",
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in engine.train([(torch.randint(0, 10, (4, 2)), torch.tensor([0, 1, 2, 0]))] * 3):
        engine.auto_update()
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert all("lora_" in name for group in held for name in group)
    assert [name.split(".")[:2] for name in held[0]] == [["1", "lora_A"], ["1", "lora_B"]]
    assert "1.lora_magnitude.default.weight" in held[1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 8, 1e-3 / 8]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
    assert set(optimizer.state) == {p for group in optimizer.param_groups for p in group["params"]}


def test_a_vector_has_nowhere_to_go() -> None:
    model = nn.Linear(4, 4)
    optimizer = Muon([model.weight])
    model.bias.requires_grad_(False)
    before = param_groups.snapshot(model)
    model.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"shape \(4,\) in a group with use_muon=True"):
        param_groups.reconcile(optimizer, model, before)


# ── what it refuses, and how it divides parameters without a model ────────────────────────────────────────────


def test_parameters_alone_are_divided_by_shape() -> None:
    model = tiny.model()
    optimizer = Muon(model.parameters(), lr=0.03)
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        (True, 0.03, 2),
        (False, 3e-4, 4),
    ]
    named = Muon(model.named_parameters())
    assert named.param_groups[0]["param_names"] == ["0.weight", "4.weight"]
    assert named.report is None


def test_bad_input() -> None:
    model = tiny.model()
    with pytest.raises(ValueError, match=r"lr=0.1 of a group with 4 parameters that are no matrices"):
        Muon([{"params": list(model.parameters()), "lr": 0.1}])
    with pytest.raises(ValueError, match=r"shape \(16,\) in a group with use_muon=True: .*use_muon=False"):
        Muon([{"params": [model[0].bias], "use_muon": True}])
    with pytest.raises(ValueError, match="[Ll]earning rate"):
        Muon(model.parameters(), lr=-1.0)
    with pytest.raises(ValueError, match="not_known is not supported"):
        Muon(model.parameters(), adjust_lr_fn="not_known")
    with pytest.raises(ValueError, match="nothing to train in this LayerNorm: none of its 2 .*AdamW"):
        Muon.for_model(nn.LayerNorm(4))
    with pytest.raises(TypeError, match="no order"):
        Muon([{"params": set(model.parameters())}])
    table = nn.Parameter(torch.zeros(2, 3, 4))
    optimizer = Muon([{"params": [table], "use_muon": True}])
    table.grad = torch.zeros(2, 3, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()
