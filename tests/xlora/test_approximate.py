"""Approximations are what they say, cost what they print, and are exact where they approximate nothing."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orbit import xlora
from orbit.adapter import RouteError, route
from orbit.xlora import CacheError, XLoRAError
from orbit.xlora.generation.approximation import carried, shallow
from orbit.xlora.passes import forward
from tests.xlora.generating import EXPERTS, llama, mixed, tokens

STEPS = 12
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": STEPS, "max_new_tokens": STEPS}
DEPTH = 3
SETTINGS: dict[str, dict[str, int]] = {
    "frozen": {"freeze_after": 6},
    "frozen within the answer": {"freeze_after": 13},
    "every third": {"route_every": 3},
    "shallow": {"router_layer": 2},
    "all": {"freeze_after": 14, "route_every": 4, "router_layer": 1},
}
EXACT = {"late": {"freeze_after": 10**6}, "every": {"route_every": 1}, "deep": {"router_layer": DEPTH}}


@pytest.fixture(scope="module", params=["layerwise", "one for all"])
def mixture(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return mixed(llama(num_hidden_layers=DEPTH), layerwise_scalings=request.param == "layerwise")


def padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(3, 9), torch.ones(3, 9).long()
    mask[1, :2] = mask[2, :5] = 0
    return ids * mask, mask


def reference(
    model: Any, ids: Tensor, freeze_after: Any = None, route_every: int = 1, router_layer: Any = None
) -> Any:
    """Logits of a text under an approximation, from its definition, token for token."""
    hidden = model.get_input_embeddings()(ids)
    with torch.no_grad(), route(model, None):
        states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        hidden = states[-1] if router_layer is None else model.model.norm(states[router_layer])
        if router_layer == DEPTH:
            hidden = states[-1]
        prediction = model.xlora_classifier(hidden, model.xlora_config)
        source = [0]
        for t in range(1, ids.shape[1]):
            frozen = freeze_after is not None and t >= freeze_after
            source.append(source[-1] if frozen or t % route_every else t)
        scalings = prediction[:, source]
    with torch.no_grad(), route(model, forward.mixture(model, scalings)):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_text_at_once(mixture: Any, kind: str) -> None:
    ids = tokens(2, 16)
    with torch.no_grad():
        exact = mixture(ids).logits
        with xlora.approximate(mixture, **SETTINGS[kind], on=ids):
            found = mixture(ids, use_cache=False).logits
    assert (found - reference(mixture, ids, **SETTINGS[kind])).abs().max() < 1e-6
    assert (found - exact).abs().max() > 1e-3


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("left", [False, True], ids=["whole", "left-padded"])
def test_decoded_is_read_at_once(mixture: Any, kind: str, left: bool) -> None:
    ids, mask = padded() if left else (tokens(3, 9), torch.ones(3, 9).long())
    with xlora.approximate(mixture, **SETTINGS[kind], on=ids):
        for beams in (1, 3):
            settings = {"attention_mask": mask, "num_beams": beams} | GREEDY
            found = mixture.generate(ids, **settings)
            assert torch.equal(found, mixture.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("kind", SETTINGS)
def test_assisted(mixture: Any, kind: str) -> None:
    ids = tokens(1, 9).repeat(1, 2)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
    with xlora.approximate(mixture, **SETTINGS[kind], on=ids):
        found = mixture.generate(ids, prompt_lookup_num_tokens=4, **settings)
        assert torch.equal(found, mixture.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("kind", EXACT)
def test_nothing_approximated_is_exact_to_the_bit(mixture: Any, kind: str) -> None:
    ids, mask = padded()
    with torch.no_grad():
        exact = mixture(ids, attention_mask=mask).logits
        tokens_exact = mixture.generate(ids, attention_mask=mask, num_beams=2, **GREEDY)
        with xlora.approximate(mixture, **EXACT[kind], on={"input_ids": ids, "attention_mask": mask}) as cost:
            assert torch.equal(mixture(ids, attention_mask=mask).logits, exact)
            assert torch.equal(
                mixture.generate(ids, attention_mask=mask, num_beams=2, **GREEDY), tokens_exact
            )
    assert cost.loss == cost.exact_loss
    assert cost.pass_share == 1.0
    assert cost.skipped == 0


def count_of_decodings(mixture: Any, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> int:
    counted = []
    decoder = mixture.model.forward
    monkeypatch.setattr(mixture.model, "forward", lambda *a, **k: counted.append(1) or decoder(*a, **k))
    mixture.generate(ids, **GREEDY)
    monkeypatch.undo()
    return len(counted)


def test_fewer_scaling_passes(mixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(2, 8)
    forwards = STEPS  # the prompt's and one per token after the first, all of which a main pass sees
    assert count_of_decodings(mixture, monkeypatch, ids) == 2 * forwards
    for settings, more in (({"freeze_after": 8}, 1), ({"freeze_after": 11}, 4), ({"route_every": 4}, 1 + 3)):
        with xlora.approximate(mixture, **settings, on=ids) as cost:
            before = cost.passes, cost.skipped
            assert before == (0, 0)
            assert count_of_decodings(mixture, monkeypatch, ids) == forwards + more
        assert (cost.passes, cost.skipped) == (more, forwards - more)


def test_the_printed_loss(mixture: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokens(2, 16)

    def mean(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    with torch.no_grad():
        exact = mean(mixture(ids).logits)
    cheap = mean(reference(mixture, ids, route_every=4))
    with xlora.approximate(mixture, route_every=4, on=ids) as cost:
        pass
    assert abs(cost.exact_loss - exact) < 1e-5
    assert abs(cost.loss - cheap) < 1e-5
    assert abs(cheap - exact) > 1e-3
    assert capsys.readouterr().out == (
        f"approximate(route_every=4): loss {cost.loss:.4f} instead of {cost.exact_loss:.4f} "
        f"({cost.loss - cost.exact_loss:+.4f}) on 30 tokens; decoded one by one they need 25 % of the scaling passes\n"
    )
    with xlora.approximate(mixture, freeze_after=4, router_layer=1, on=ids):
        said = capsys.readouterr().out
    assert "25 % of the scaling passes, of 1 layers each" in said


def test_the_loss_of_a_padded_batch(mixture: Any) -> None:
    ids, mask = padded()
    batch = {"input_ids": ids, "attention_mask": mask}
    with xlora.approximate(mixture, freeze_after=3, on=batch) as cost, torch.no_grad():
        labels = ids.masked_fill(mask == 0, -100)
        labels[1, 2] = labels[2, 5] = -100
        assert float(mixture(**batch, labels=labels).loss) == pytest.approx(cost.loss)
    assert cost.tokens == 8 + 6 + 3
    assert cost.pass_share == pytest.approx(9 / 20)


def test_undone(mixture: Any) -> None:
    ids, blocks = tokens(), mixture.model.layers
    with torch.no_grad():
        exact = mixture(ids).logits
        with xlora.approximate(mixture, route_every=2, on=ids) as outer:
            one = mixture(ids).logits
            with xlora.approximate(mixture, route_every=3, on=ids) as inner:
                assert mixture.xlora_approximation is inner
                assert inner.exact_loss == outer.exact_loss
            assert mixture.xlora_approximation is outer
            assert torch.equal(mixture(ids).logits, one)
        with pytest.raises(ZeroDivisionError), xlora.approximate(mixture, router_layer=1, on=ids):
            raise ZeroDivisionError
        with pytest.raises(IndexError), xlora.approximate(mixture, router_layer=1, on=ids + 10**6):
            pass
        assert mixture.xlora_approximation is None
        assert mixture.model.layers is blocks
        assert torch.equal(mixture(ids).logits, exact)


def test_the_log_is_of_the_users_forwards(mixture: Any) -> None:
    ids = tokens(2, 7)
    mixture.enable_scalings_logging()
    with xlora.approximate(mixture, freeze_after=2, on=ids):
        assert mixture.get_scalings_log() == []
        mixture(ids)
    (logged,) = mixture.get_scalings_log()
    mixture.disable_scalings_logging()
    assert torch.equal(logged[:, 1:], logged[:, 1:2].expand(-1, 6, -1, -1))


def test_caches_of_another_kind(mixture: Any) -> None:
    ids = tokens()
    with torch.no_grad():
        exact = mixture(ids).past_key_values
        with xlora.approximate(mixture, route_every=3, on=ids):
            with pytest.raises(CacheError, match="filled exactly or under another approximation"):
                mixture(ids, past_key_values=exact)
            ours = mixture(ids).past_key_values
            again = copy.deepcopy(ours)
            assert torch.equal(
                mixture(ids, past_key_values=ours).logits, mixture(ids, past_key_values=again).logits
            )
            with pytest.raises(CacheError, match="use a dynamic one under approximate"):
                mixture.generate(ids, cache_implementation="static", **GREEDY)
        with pytest.raises(CacheError, match="filled under xlora.approximate"):
            mixture(ids, past_key_values=ours)
        with (
            xlora.approximate(mixture, route_every=4, on=ids),
            pytest.raises(CacheError, match="filled exactly"),
        ):
            mixture(ids, past_key_values=ours)


def test_an_emptied_cache_is_an_empty_one(mixture: Any) -> None:
    ids = tokens()
    with torch.no_grad():
        exact = mixture(ids).logits
        with xlora.approximate(mixture, route_every=3, on=ids):
            first = mixture(ids)
            cache = first.past_key_values
            cache.crop(-ids.shape[1])
            assert torch.equal(mixture(ids, past_key_values=cache).logits, first.logits)
            cache.reset()
        with xlora.approximate(mixture, route_every=4, on=ids):
            mixture(ids, past_key_values=cache)
            cache.reset()
        assert torch.equal(mixture(ids, past_key_values=cache).logits, exact)


def test_another_thread_finds_no_model_cut_short(mixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, here, refused = tokens(), [], []
    scaling_pass = forward.scaling_pass

    def elsewhere() -> None:
        with pytest.raises(RouteError, match="one route at a time"):
            mixture(ids)
        refused.append(True)

    def counted(*args: Any) -> Tensor:
        here.append(threading.get_ident())
        if len(here) == 1:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return scaling_pass(*args)

    with torch.no_grad(), xlora.approximate(mixture, router_layer=1, on=ids):
        monkeypatch.setattr(forward, "scaling_pass", counted)
        mixture(ids)
    assert refused
    assert here == [threading.get_ident()]
    assert len(mixture.model.layers) == DEPTH


def test_tokens_that_wait_are_given_alike(mixture: Any) -> None:
    ids = tokens(2, 5)
    with torch.no_grad(), xlora.approximate(mixture, route_every=6, on=ids):
        cache = mixture(ids).past_key_values
        mixture(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[5]]))
        with pytest.raises(CacheError, match="give all of a text alike"):
            mixture(inputs_embeds=mixture.get_input_embeddings()(ids), past_key_values=cache)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"freeze_after": 0}, r"freeze_after=0\): it must be None, or at least 1"),
    ({"route_every": 0}, r"route_every=0\): it must be at least 1"),
    ({"route_every": True}, "route_every=True"),
    ({"router_layer": 4}, "from 1 to 3"),
    ({"router_layer": 0}, "from 1 to 3"),
    ({"on": {"attention_mask": torch.ones(1, 2)}}, "neither labels nor input_ids"),
    ({"on": torch.ones(2, 1).long()}, "no token to predict"),
]


@pytest.mark.parametrize(("bad", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input(mixture: Any, bad: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {"on": tokens()} | bad
    with pytest.raises(XLoRAError, match=said), xlora.approximate(mixture, **settings):
        pass
    assert mixture.xlora_approximation is None


def test_where_nothing_can_be_approximated(mixture: Any) -> None:
    ids = tokens()
    refused = pytest.raises(XLoRAError, match="mixes no experts now")
    with route(mixture, EXPERTS[0]), refused, xlora.approximate(mixture, on=ids):
        pass
    training = copy.deepcopy(mixture).train()
    with pytest.raises(XLoRAError, match=r"call model\.eval\(\)"), xlora.approximate(training, on=ids):
        pass
    assert training.training


def test_carried() -> None:
    p = torch.arange(5.0).view(1, 5, 1, 1)
    routed = torch.tensor([[False, False, True, False, True]])
    assert carried(p, routed, None).flatten().tolist() == [0, 0, 2, 2, 4]
    assert carried(p, routed, torch.full((1, 1, 1, 1), 9.0)).flatten().tolist() == [9, 9, 2, 2, 4]


def test_shallow(mixture: Any) -> None:
    before = mixture.model.layers
    with shallow(mixture, 2):
        assert [*mixture.model.layers] == [*before][:2]
    assert mixture.model.layers is before
