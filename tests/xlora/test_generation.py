"""`generate` with the caches of both passes gives the tokens of two whole passes per token."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from orbit.adapter import route
from orbit.xlora import CacheError
from orbit.xlora.generation.cache import TwinCache, twin
from tests.xlora.generating import EXPERTS, VOCABULARY, by_whole_passes, llama, mixed, tokens

STEPS = 12
LENGTHS = {"min_new_tokens": STEPS, "max_new_tokens": STEPS}
GREEDY: dict[str, Any] = {"do_sample": False, **LENGTHS}


@pytest.fixture(scope="module")
def mixture() -> Any:
    torch.manual_seed(0)
    return mixed(llama())


def padded(rows: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """Texts of different lengths with padding on the left, and their mask."""
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return ids * mask, mask


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, all": {"num_beams": 3, "num_return_sequences": 3},
    "sampled": {"do_sample": True, "top_k": 20},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beam-sampled": {"do_sample": True, "num_beams": 2},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "chunked": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", [False, True], ids=["whole", "left-padded"])
def test_cached_is_uncached(mixture: Any, way: str, left: bool) -> None:
    ids, mask = padded() if left else (tokens(3), torch.ones(3, 9, dtype=torch.long))
    settings = {"attention_mask": mask} | GREEDY | WAYS[way]
    uncached = {key: value for key, value in settings.items() if key != "prefill_chunk_size"}
    torch.manual_seed(1)
    cached = mixture.generate(ids, **settings)
    torch.manual_seed(1)
    assert torch.equal(cached, mixture.generate(ids, **uncached, use_cache=False))


@pytest.mark.parametrize("left", [False, True], ids=["whole", "left-padded"])
def test_greedy_is_two_whole_passes_per_token(mixture: Any, left: bool) -> None:
    ids, mask = padded() if left else (tokens(3), None)
    found = mixture.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, by_whole_passes(mixture, ids, STEPS, mask))
    with mixture.disable():
        assert not torch.equal(found, by_whole_passes(mixture, ids, STEPS, mask))


def test_the_end_of_a_text(mixture: Any) -> None:
    ids = tokens(3)
    free = mixture.generate(ids, **GREEDY)
    end = int(free[0, 12])
    settings = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": end, "pad_token_id": 0}
    found = mixture.generate(ids, **settings)
    assert torch.equal(found, mixture.generate(ids, **settings, use_cache=False))
    assert (found[0] == end).any()
    assert int(found[0, -1]) in (end, 0)


OFFLOADED = pytest.param("offloaded", marks=pytest.mark.gpu)  # transformers offloads to streams of CUDA


@pytest.mark.parametrize("implementation", ["dynamic", "static", OFFLOADED])
@pytest.mark.parametrize("left", [False, True], ids=["whole", "left-padded"])
def test_kinds_of_cache(mixture: Any, implementation: str, left: bool) -> None:
    device = "cuda" if implementation == "offloaded" else "cpu"
    mixture = copy.deepcopy(mixture).to(device)
    ids, mask = (each.to(device) for each in (padded() if left else (tokens(3), torch.ones(3, 9).long())))
    found = mixture.generate(ids, attention_mask=mask, cache_implementation=implementation, **GREEDY)
    assert torch.equal(found, by_whole_passes(mixture, ids, STEPS, mask))


def test_a_quantised_cache(mixture: Any) -> None:
    from transformers import QuantizedCache

    ids = tokens()
    kept = QuantizedCache("fp8", config=mixture.config)
    found = mixture.generate(
        ids, past_key_values=kept, return_dict_in_generate=True, output_logits=True, **GREEDY
    )
    assert isinstance(kept.scaling, QuantizedCache)
    assert kept.scaling.get_seq_length() == kept.get_seq_length() == ids.shape[1] + STEPS - 1
    with torch.no_grad():
        logits = mixture(found.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    assert (torch.stack(found.logits, 1) - logits).abs().mean() < 0.2 * logits.abs().mean()


def test_static_beams(mixture: Any) -> None:
    ids = tokens()
    found = mixture.generate(ids, cache_implementation="static", num_beams=3, **GREEDY)
    assert torch.equal(found, mixture.generate(ids, num_beams=3, use_cache=False, **GREEDY))


def test_a_static_cache_is_not_compiled(mixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CompileConfig

    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("the forward was compiled"))
    compiling = CompileConfig()
    compiling._compile_all_devices = True
    ids = tokens()
    found = mixture.generate(ids, cache_implementation="static", compile_config=compiling, **GREEDY)
    assert torch.equal(found, by_whole_passes(mixture, ids, STEPS))


@pytest.mark.parametrize("helper", ["prompt lookup", "base", "itself"])
def test_assisted(mixture: Any, helper: str) -> None:
    ids = tokens(1, 9).repeat(1, 2)
    settings: dict[str, Any] = {"assistant_model": mixture if helper == "itself" else llama()}
    if helper == "prompt lookup":
        settings = {"prompt_lookup_num_tokens": 4}
    found = mixture.generate(ids, **settings, do_sample=False, max_new_tokens=24)
    assert torch.equal(found, by_whole_passes(mixture, ids, 24))


def test_from_embeddings(mixture: Any) -> None:
    ids = tokens()
    embedded = mixture.get_input_embeddings()(ids)
    found = mixture.generate(inputs_embeds=embedded, **GREEDY)
    assert torch.equal(found, by_whole_passes(mixture, ids, STEPS)[:, ids.shape[1] :])


def test_a_conversation(mixture: Any) -> None:
    ids, more = tokens(2, 6), tokens(2, 5)
    first = mixture.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert isinstance(first.past_key_values, TwinCache)
    text = torch.cat([first.sequences, more], 1)
    second = mixture.generate(text, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, by_whole_passes(mixture, text, STEPS))
    with torch.no_grad():
        logits = mixture(first.sequences, use_cache=False).logits[:, 5:-1]
    assert (torch.stack(first.logits, 1) - logits).abs().max() < 1e-5


def test_a_cache_of_the_users(mixture: Any) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=mixture.config)
    text = tokens(1, 6)
    for turn in range(3):
        text = torch.cat([text, tokens(1, 3)], 1) if turn else text
        found = mixture.generate(text, past_key_values=cache, **GREEDY)
        assert torch.equal(found, by_whole_passes(mixture, text, STEPS))
        text = found
    assert type(cache).__name__ == "DynamicCache"
    assert isinstance(cache, DynamicCache)


def test_one_prompt_for_many(mixture: Any) -> None:
    prompt = tokens(1, 6)
    with torch.no_grad():
        kept = mixture(prompt).past_key_values
    for again in (copy.deepcopy(kept), copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        text = torch.cat([prompt, tokens(1, 4)], 1)
        found = mixture.generate(text, past_key_values=again, **GREEDY)
        assert torch.equal(found, by_whole_passes(mixture, text, STEPS))
    assert kept.get_seq_length() == kept.scaling.get_seq_length() == 6


def test_one_token_at_a_time(mixture: Any) -> None:
    ids, cache, steps = tokens(2, 7), None, []
    for column in ids.split(1, 1):
        with torch.no_grad():
            output = mixture(column, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    with torch.no_grad():
        assert (torch.cat(steps, 1) - mixture(ids).logits).abs().max() < 1e-5
    cache.reset()
    with torch.no_grad():
        assert (mixture(ids, past_key_values=cache).logits - torch.cat(steps, 1)).abs().max() < 1e-5


def test_rows_of_a_cache(mixture: Any) -> None:
    ids, more = tokens(2, 6), tokens(4, 3)
    with torch.no_grad():
        cache = mixture(ids).past_key_values
        cache.batch_repeat_interleave(2)
        whole = mixture(torch.cat([ids.repeat_interleave(2, 0), more], 1)).logits[:, 6:]
        assert (mixture(more, past_key_values=copy.deepcopy(cache)).logits - whole).abs().max() < 1e-5
        cache.batch_select_indices(torch.tensor([3, 0]))
        assert (mixture(more[[3, 0]], past_key_values=cache).logits - whole[[3, 0]]).abs().max() < 1e-5


def test_an_offloaded_cache_shares_its_stream(mixture: Any) -> None:
    from transformers import DynamicCache

    pair = twin(DynamicCache(config=mixture.config, offloading=True))
    assert pair.scaling.offloading
    assert pair.scaling.prefetch_stream is pair.prefetch_stream
    assert pair.scaling.layers[0] is not pair.layers[0]


def test_as_a_tuple(mixture: Any) -> None:
    ids = tokens()
    with torch.no_grad():
        logits, cache = mixture(ids, return_dict=False)
        assert torch.equal(logits, mixture(ids).logits)
        assert isinstance(cache, TwinCache)


@pytest.mark.parametrize("lost", ["reorder_cache", "crop"])
def test_these_tests_see_a_companion_that_is_left_behind(
    mixture: Any, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_main(self: Any, *args: Any) -> None:
        getattr(super(TwinCache, self), lost)(*args)

    monkeypatch.setattr(TwinCache, lost, only_main)
    ids = tokens(1, 9).repeat(1, 2)
    if lost == "crop":
        with pytest.raises(CacheError, match="the scaling pass has seen"):
            mixture.generate(ids, prompt_lookup_num_tokens=4, do_sample=False, max_new_tokens=24)
    else:
        settings = {"num_beams": 3, "num_return_sequences": 3} | GREEDY
        wrong = [
            mixture.generate(one, **settings).equal(mixture.generate(one, use_cache=False, **settings))
            for one in tokens(6).split(1)
        ]
        assert not all(wrong)


def test_a_cache_that_the_scaling_pass_has_not_seen(mixture: Any) -> None:
    ids = tokens()
    with mixture.disable(), torch.no_grad():
        theirs = mixture(ids, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="holds 9 tokens of another model"):
        mixture(ids, past_key_values=theirs)
    with torch.no_grad():
        ours = mixture(ids).past_key_values
        with route(mixture, EXPERTS[0]):
            mixture(ids, past_key_values=ours)
    with pytest.raises(CacheError, match="holds 18 tokens and the scaling pass has seen 9"):
        mixture(ids, past_key_values=ours)
    with pytest.raises(CacheError, match="is a tuple"):
        mixture(ids, past_key_values=((ids, ids),))


@pytest.mark.parametrize("keep", [1, 3, 0, torch.tensor([0, 4])], ids=str)
def test_a_head_with_experts_keeps_logits(keep: Any) -> None:
    head = mixed(llama(), targets=("q_proj", "lm_head"))
    ids = tokens()
    with torch.no_grad():
        whole = head(ids, use_cache=False).logits
        kept = head(ids, logits_to_keep=keep).logits
    assert torch.equal(kept, whole[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)])


def test_a_head_with_experts_generates() -> None:
    head = mixed(llama(), targets=("q_proj", "lm_head"))
    ids = tokens()
    assert torch.equal(head.generate(ids, **GREEDY), by_whole_passes(head, ids, STEPS))


def test_a_task_generates_as_ever(mixture: Any) -> None:
    ids = tokens()
    with route(mixture, EXPERTS[1]):
        found = mixture.generate(ids, return_dict_in_generate=True, **GREEDY)
        assert not isinstance(found.past_key_values, TwinCache)
        assert torch.equal(found.sequences, mixture.generate(ids, use_cache=False, **GREEDY))
    assert not torch.equal(found.sequences, mixture.generate(ids, **GREEDY))


@pytest.mark.parametrize("what", ["model", "blocks"])
def test_compiled(mixture: Any, what: str) -> None:
    torch._dynamo.reset()
    compiled = copy.deepcopy(mixture)
    if what == "model":
        compiled = torch.compile(compiled, backend="eager")
    else:
        for block in compiled.model.layers:
            block.compile(backend="eager")
    with torch.no_grad():
        for text in (tokens(), tokens(3, 9)):
            assert (compiled(text).logits - mixture(text).logits).abs().max() < 1e-5
    torch._dynamo.reset()


def test_a_stopping_criterion(mixture: Any) -> None:
    from transformers import StoppingCriteriaList

    ids = tokens(3)

    def stop(text: Tensor, scores: Any, **_: Any) -> Tensor:
        return text[:, -1] % 5 == 0

    settings = {
        "do_sample": False,
        "max_new_tokens": STEPS,
        "stopping_criteria": StoppingCriteriaList([stop]),
        "pad_token_id": 0,
        "eos_token_id": 95,
    }
    found = mixture.generate(ids, **settings)
    assert torch.equal(found, mixture.generate(ids, use_cache=False, **settings))
    assert not torch.equal(found, mixture.generate(ids, **GREEDY))


def test_paged_batching_is_refused(mixture: Any) -> None:
    with pytest.raises(CacheError, match="cache= is a state"):
        mixture(tokens(), cache=object(), use_cache=False)
    with pytest.raises(CacheError, match="a mixture needs two"):
        mixture.generate(tokens(), cache_implementation="paged", **GREEDY)


def test_the_vocabulary_is_used(mixture: Any) -> None:
    """Random weights that always say one thing would hide a wrong cache."""
    found = mixture.generate(tokens(4), **GREEDY)[:, 9:]
    assert len(found.unique()) > VOCABULARY // 6


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_smollm2(beams: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orbit.demo.smollm2 import smollm2

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    real = mixed(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), noise=0.03)
    texts = ["The capital of France is", "In the beginning God created the heaven and"]
    given = dict(tokenizer(texts, return_tensors="pt", padding=True)) | GREEDY | {"num_beams": beams}
    found = real.generate(**given)
    assert torch.equal(found, real.generate(**given, use_cache=False))
    with real.disable():
        assert not torch.equal(found, real.generate(**given))
