"""The low-rank update against its formula: value, derivatives, what it keeps, dtypes, tracing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orbit.adapter.lora import fresh_factors, fused, low_rank

Inputs = dict[str, Tensor | None]
COEFFICIENTS = ["scalar", "ranks", "rows", "tokens"]


def inputs(
    *shape: int,
    C: str = "scalar",
    D: str | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """x, W, b, A, B, C, D with in = shape[-1], out 5, R 3; all of them want gradients."""
    torch.manual_seed(0)

    def shaped(kind: str | None, n: int) -> Tensor | None:
        shapes = {
            "scalar": (),
            "ranks": (n,),
            "out": (n,),
            "rows": (shape[0], *[1] * (len(shape) - 2), n),
            "tokens": (*shape[:-1], n),
        }
        return None if kind is None else torch.randn(shapes[kind], dtype=dtype)

    found = {
        "x": torch.randn(*shape, dtype=dtype),
        "W": torch.randn(5, shape[-1], dtype=dtype),
        "b": torch.randn(5, dtype=dtype) if bias else None,
        "A": torch.randn(3, shape[-1], dtype=dtype),
        "B": torch.randn(5, 3, dtype=dtype),
        "C": shaped(C, 3),
        "D": shaped(D, 5),
    }
    return {name: None if t is None else t.requires_grad_() for name, t in found.items()}


def formula(x, W, b, A, B, C, D):  # type: ignore[no-untyped-def]
    u = F.linear(x, W, b)
    y = u if D is None else u + D * (u - (0 if b is None else b))
    return y + (C * (x @ A.T)) @ B.T


def beside(x, W, b, A, B, C, D):  # type: ignore[no-untyped-def]
    return low_rank(F.linear(x, W, b), x, A, B, C, D, b)


WAYS = {"fused": fused, "beside": beside}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("C", COEFFICIENTS)
@pytest.mark.parametrize("D", [None, "out", "rows", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_the_formulas(way: str, C: str, D: str | None, bias: bool) -> None:
    given = inputs(2, 3, 4, C=C, D=D, bias=bias)
    wanted = [t for t in given.values() if t is not None]
    y, expected = WAYS[way](**given), formula(**given)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy))
    with torch.no_grad():
        torch.testing.assert_close(WAYS[way](**given), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(4,), (2, 4), (0, 4), (0, 3, 4)])
def test_every_shape_of_input(way: str, shape: tuple[int, ...]) -> None:
    given = inputs(*shape, D="out")
    wanted = [t for t in given.values() if t is not None]
    y, expected = WAYS[way](**given), formula(**given)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("C", "D"), [("scalar", None), ("scalar", "out"), ("rows", "rows"), ("tokens", "out")]
)
def test_first_and_second_derivatives(way: str, C: str, D: str | None) -> None:
    given = inputs(2, 2, 4, C=C, D=D)
    names = [name for name, t in given.items() if t is not None]

    def run(*tensors: Tensor) -> Tensor:
        return WAYS[way](**{**given, **dict(zip(names, tensors, strict=True))})

    values = [given[name] for name in names]
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_of_factors_for_each_part_of_the_batch(way: str) -> None:
    given = inputs(4, 3, 4, D="rows")
    for parts in (2, 4):
        A = torch.randn(parts, 3, 4, dtype=torch.float64, requires_grad=True)
        B = torch.randn(parts, 5, 3, dtype=torch.float64, requires_grad=True)
        each = {name: given[name] for name in ("W", "b", "C")}
        size = 4 // parts
        expected = torch.cat(
            [
                formula(**each, x=x, A=A[i], B=B[i], D=D)
                for i, (x, D) in enumerate(zip(given["x"].split(size), given["D"].split(size), strict=True))
            ]
        )
        y = WAYS[way](**{**given, "A": A, "B": B})
        torch.testing.assert_close(y, expected)
        wanted, dy = [given["x"], given["D"], given["C"], A, B], torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy)
        )


def test_a_loss_of_the_output_and_of_its_own_gradient() -> None:
    """p is an output that nobody sees, and has two gradients here: through y and through dB."""
    given = inputs(2, 4)
    results = []
    for way in (fused, beside, formula):
        y = way(**given)
        (dB,) = torch.autograd.grad(y.square().sum(), given["B"], create_graph=True)
        results.append(torch.autograd.grad(y.sum() + dB.square().sum(), [given[n] for n in "xAB"]))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


@pytest.mark.parametrize("way", WAYS)
def test_skips_gradients_that_nobody_asks_for(way: str) -> None:
    given = {name: None if t is None else t.detach() for name, t in inputs(2, 4, D="out").items()}
    given["A"].requires_grad_()
    WAYS[way](**given).sum().backward()
    assert given["A"].grad is not None
    assert all(t is None or t.grad is None for name, t in given.items() if name != "A")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("D", [None, "out"])
def test_the_output_may_be_overwritten(way: str, bias: bool, D: str | None) -> None:
    given = inputs(2, 3, 4, D=D, bias=bias)
    wanted = [t for t in given.values() if t is not None]
    y, expected = torch.relu_(WAYS[way](**given)), torch.relu(formula(**given))
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


@pytest.mark.parametrize(("D", "sizes"), [(None, [(3, 8)]), ("out", [(3, 8), (2, 4, 5)])])
def test_keeps_x_and_a_small_p_and_for_dora_the_layers_product(D: str | None, sizes: list[tuple]) -> None:
    given = inputs(2, 4, 6, D=D, bias=False)
    given["W"].requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused(**given)
    own = {t.data_ptr() for t in given.values() if t is not None}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == sizes


@pytest.mark.parametrize("way", WAYS)
def test_keeps_no_input_for_frozen_factors(way: str) -> None:
    given = inputs(2, 4, 6, bias=False)
    for name in ("W", "A", "B"):
        given[name].requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = WAYS[way](**given)
    assert all(t.data_ptr() != given["x"].data_ptr() for t in kept)
    x, C = given["x"], given["C"]
    expected = torch.autograd.grad(formula(**given).square().sum(), [x, C])
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [x, C]), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_adapter_returns_the_very_bits(way: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(3, 64, 200, D="out", dtype=dtype)
        given["B"], given["D"] = torch.zeros(5, 3), torch.zeros(5)
        given["A"] = given["A"].detach().float()
        assert torch.equal(WAYS[way](**given), F.linear(given["x"], given["W"], given["b"]))


@pytest.mark.parametrize("way", WAYS)
def test_float32_adapters_of_a_bf16_layer(way: str) -> None:
    """Multiplied in bf16: the error against float64 is that of rounding the output once or twice."""
    given = inputs(64, 256, D="out", dtype=torch.bfloat16)
    for name in "ABCD":
        given[name] = (0.1 * given[name].detach().float()).requires_grad_()
    exact = {name: None if t is None else t.detach().double().requires_grad_() for name, t in given.items()}
    y, truth = WAYS[way](**given), formula(**exact)
    assert y.dtype == torch.bfloat16
    assert (y - truth).norm() < 4e-3 * truth.norm()
    dy = torch.randn_like(truth)
    mine = torch.autograd.grad(y, [given[n] for n in "xABD"], dy.bfloat16())
    best = torch.autograd.grad(truth, [exact[n] for n in "xABD"], dy)
    assert [g.dtype for g in mine] == [torch.bfloat16, *[torch.float32] * 3]
    for name, a, b in zip("xABD", mine, best, strict=True):
        assert (a - b).norm() < 8e-3 * b.norm(), name


def test_autocast_gives_what_plain_operations_give() -> None:
    given = inputs(2, 3, 4, dtype=torch.float32)
    wanted = [given[n] for n in "xAB"]
    with torch.autocast("cpu", torch.bfloat16):
        plain = formula(**given)
        for way in WAYS.values():
            y = way(**given)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)
            mine = torch.autograd.grad(y.float().sum(), wanted)
            assert {g.dtype for g in mine} == {torch.float32}
            expected = torch.autograd.grad(plain.float().sum(), wanted, retain_graph=True)
            torch.testing.assert_close(mine, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("way", WAYS)
def test_per_sample_gradients_by_vmap(way: str) -> None:
    given = {name: None if t is None else t.detach() for name, t in inputs(5, 3, 4, D="out").items()}

    def loss(A: Tensor, D: Tensor, x: Tensor) -> Tensor:
        return WAYS[way](**{**given, "A": A, "D": D, "x": x}).square().sum()

    grad = torch.func.grad(loss, (0, 1))
    each = torch.func.vmap(grad, (None, None, 0))(given["A"], given["D"], given["x"])
    for i in range(5):
        one = grad(given["A"], given["D"], given["x"][i])
        torch.testing.assert_close([g[i] for g in each], list(one))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_compiles_into_one_graph(way: str) -> None:
    given = inputs(2, 3, 4, D="out", dtype=torch.float32)
    wanted = [t for t in given.values() if t is not None]
    torch._dynamo.reset()
    compiled = torch.compile(lambda kw: WAYS[way](**kw), fullgraph=True, backend="aot_eager")
    y, expected = compiled(given), formula(**given)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
    )


def test_fresh_factors() -> None:
    A, B = fresh_factors(50, 20, 4, device=torch.device("cpu"), dtype=torch.float32)
    assert A.shape == (4, 50)
    assert not B.any()
    assert 0.5 * 50**-0.5 < A.abs().max() <= 50**-0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch scripts its decompositions
@pytest.mark.parametrize("D", [None, "out"])
@pytest.mark.parametrize("C", ["scalar", "rows"])
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode(way: str, C: str, D: str | None) -> None:
    given = {n: None if t is None else t.detach() for n, t in inputs(2, 3, 4, C=C, D=D).items()}

    def value(A: Tensor, x: Tensor, of: Callable[..., Tensor]) -> Tensor:
        return of(**{**given, "A": A, "x": x}).sin()

    at = given["A"], given["x"]
    for of in (WAYS[way], formula):
        forwards = torch.func.jacfwd(value, (0, 1))(*at, of)
        torch.testing.assert_close(forwards, torch.func.jacrev(value, (0, 1))(*at, formula))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(at[0], torch.ones_like(at[0]))
        one = torch.autograd.forward_ad.unpack_dual(value(dual, at[1], WAYS[way])).tangent
    torch.testing.assert_close(one, forwards[0].sum((-1, -2)))
