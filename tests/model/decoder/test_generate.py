"""Text, token for token what transformers makes of the same weights."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from orbit.model import MaskError, SettingError, ShapeError, Transformer, TransformerConfig
from orbit.model.decoder import generate
from tests.model.decoder.llamas import llama, ours, prompts

HOW = {
    "greedy": {},
    "greedy with a penalty": {"repetition_penalty": 1.7},
    "drawn": {"do_sample": True, "temperature": 1.0},
    "temperature": {"do_sample": True, "temperature": 0.6},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-k of more than all": {"do_sample": True, "top_k": 500},
    "top-p": {"do_sample": True, "top_p": 0.7},
    "a tiny top-p": {"do_sample": True, "top_p": 1e-9},
    "everything": {
        "do_sample": True,
        "temperature": 1.4,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
    },
}


@pytest.fixture(scope="module")
def theirs():
    return llama()


@pytest.fixture(scope="module")
def model(theirs):
    return ours(theirs)


def by_transformers(theirs, ids, mask=None, **how):
    mask = torch.ones_like(ids) if mask is None else mask
    how = {"do_sample": False, "top_k": 0 if how.get("do_sample") else None, "max_new_tokens": 16, **how}
    torch.manual_seed(3)
    return theirs.generate(ids, attention_mask=mask, **how)


def by_us(model, ids, mask=None, **how):
    torch.manual_seed(3)
    return model.generate(ids, mask, **{"max_new_tokens": 16, **how})


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_the_tokens_of_transformers(theirs, model, how):
    ids, _ = prompts(rows=3)
    found = by_us(model, ids, **how)
    assert found.shape == (3, 28)
    assert torch.equal(found, by_transformers(theirs, ids, **how))


@pytest.mark.parametrize("how", ["greedy", "everything"])
def test_prompts_padded_on_the_left(theirs, model, how):
    how = {**HOW[how], "repetition_penalty": 1.0}  # transformers makes padding's token less likely too
    ids, mask = prompts(rows=3, padding=5)
    assert torch.equal(by_us(model, ids, mask, **how), by_transformers(theirs, ids, mask, **how))


@pytest.mark.parametrize("how", ["greedy", "greedy with a penalty"])
def test_a_row_does_not_depend_on_its_padding(model, how):
    ids, mask = prompts(rows=2, padding=5)
    alone = by_us(model, ids[:1, 5:], **HOW[how])
    ids[0, :5] = alone[0, 7]  # the token that comes first, and that a penalty would make less likely
    assert torch.equal(by_us(model, ids, mask, **HOW[how])[:1, 5:], alone)


@pytest.mark.parametrize(
    "settings", [{"kind": "mistral", "sliding_window": 4}, {"kind": "qwen3"}, {"tie_word_embeddings": True}]
)
def test_other_kinds(settings):
    theirs = llama(**settings)
    ids, mask = prompts(rows=2, padding=3)
    assert torch.equal(by_us(ours(theirs), ids, mask), by_transformers(theirs, ids, mask))


@pytest.mark.parametrize("several", [False, True])
def test_rows_end_and_are_filled(theirs, model, several):
    ids, _ = prompts(rows=3)
    whole = by_us(model, ids)
    end = [whole[0, 14].item(), whole[1, 17].item()] if several else whole[0, 14].item()
    for pad in (None, 7):
        wanted = by_transformers(theirs, ids, eos_token_id=end, pad_token_id=pad if pad is not None else 0)
        found = by_us(model, ids, eos_token_id=end, pad_token_id=pad)
        assert torch.equal(found, wanted)
    assert (found[0, 15:] == 7).all()
    assert by_us(model, ids[:1], eos_token_id=end).shape[1] == 15, "it goes on after its end"


def test_without_a_padding_token_the_end_fills():
    model = Transformer(
        TransformerConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, init_std=0.5)
    )
    ids = torch.tensor([[1, 2, 3], [3, 1, 2], [4, 4, 4], [5, 6, 7]])
    whole = model.generate(ids, max_new_tokens=8)
    end = next(t for t in whole[0, 3:].tolist() if (whole[1:, 3] != t).any())
    ended = model.generate(ids, max_new_tokens=8, eos_token_id=end)
    after = (ended[0, 3:] == end).nonzero()[0, 0]
    assert (ended[0, 3 + after :] == end).all()


def test_the_config_says_what_ends_a_text(theirs, model):
    ids, _ = prompts(rows=1)
    end = by_us(model, ids)[0, 15].item()
    ending = Transformer(TransformerConfig(**{**vars(model.config), "eos_token_id": end}))
    ending.load_state_dict(model.state_dict())
    assert by_us(ending, ids).shape[1] <= 16
    assert by_us(ending, ids)[0, -1] == end


def test_the_models_max_length_ends_a_text(theirs, model):
    ids, _ = prompts(length=60)
    assert model.config.max_length == 64
    assert by_us(model, ids).shape[1] == 64
    with pytest.raises(
        ShapeError, match=r"a prompt of 64 tokens leaves no room in the model's max_length 64"
    ):
        by_us(model, prompts(length=64)[0])


def test_a_generator_of_ones_own(model):
    ids, _ = prompts()
    before = torch.get_rng_state()
    one, two = (
        model.generate(ids, max_new_tokens=9, temperature=2.0, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, model.generate(ids, max_new_tokens=9))


def test_a_streamer_gets_everything_and_a_criterion_ends_it(model):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], 0

        def put(self, ids):
            self.got.append(ids)

        def end(self):
            self.ended += 1

    ids, _ = prompts(rows=1)
    streamer = Streamer()
    made = by_us(model, ids, streamer=streamer, stopping_criteria=[lambda ids, scores: ids[:, -1] > -1])
    assert made.shape[1] == ids.shape[1] + 1
    assert streamer.ended == 1
    assert torch.equal(torch.cat([part.flatten() for part in streamer.got]), made[0])
    calls = []
    by_us(model, ids, stopping_criteria=[lambda ids, scores: calls.append(scores.shape) or ids[:, -1] < 0])
    assert calls == [(1, 50)] * 16


def test_new_tokens_pass_the_model_alone(model):
    widths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append((args[0].shape[1], kwargs["logits_to_keep"])),
        with_kwargs=True,
    )
    by_us(model, prompts()[0], max_new_tokens=4)
    handle.remove()
    assert widths == [(12, 1), (1, 1), (1, 1), (1, 1)]


def test_the_model_is_in_eval_mode_meanwhile_and_as_before_afterwards():
    config = TransformerConfig(vocab_size=9, hidden_size=8, num_layers=2, num_heads=2, attention_dropout=0.9)
    model = Transformer(config).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model.generate(ids, max_new_tokens=9), model.generate(ids, max_new_tokens=9))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(ids, stopping_criteria=[lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))])
    assert [module.training for module in model.modules()] == before


def test_what_was_made_can_be_trained_on(model):
    """Its tensors are ordinary ones: reinforcement learning goes on with them."""
    made = by_us(model, prompts()[0], max_new_tokens=3)
    assert not made.is_inference()
    model(made, labels=made).loss.backward()
    model.zero_grad()


def test_as_a_function(model):
    ids, _ = prompts()
    assert torch.equal(generate(model, ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


def test_a_compiled_model_generates_from_a_few_graphs(model):
    """Lengths are no constants of a graph: one for the prompt, one for a token, and not one more a token."""
    ids, _ = prompts(rows=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    try:
        assert torch.equal(generate(compiled, ids, max_new_tokens=12), by_us(model, ids, max_new_tokens=12))
    finally:
        torch.compiler.reset()
    assert counter.frame_count <= 3


def test_experts_generate():
    config = TransformerConfig(
        vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, num_experts=4, init_std=0.3
    )
    model = Transformer(config).eval()
    ids, mask = prompts(rows=2, padding=4, vocab=20)
    made = model.generate(ids, mask, max_new_tokens=6)
    for _ in range(6):  # without a cache
        ids = torch.cat((ids, model(ids, mask).logits[:, -1:].argmax(-1)), 1)
        mask = torch.ones_like(ids) * torch.cat((mask, mask[:, -1:]), 1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize(
    ("wrong", "error", "why"),
    [
        ({"temperature": 0.0}, SettingError, "temperature 0.0 must be above 0"),
        ({"temperature": float("inf")}, SettingError, "temperature inf must be above 0"),
        ({"top_k": -1}, SettingError, "top_k -1 must be"),
        ({"top_k": 2.5}, SettingError, "top_k 2.5 must be"),
        ({"top_p": 0.0}, SettingError, "top_p 0.0 must be above 0"),
        ({"top_p": 1.1}, SettingError, "top_p 1.1 must be above 0"),
        ({"repetition_penalty": 0.0}, SettingError, "repetition_penalty 0.0 must be above 0"),
        ({"do_sample": False, "top_p": 0.5}, SettingError, "top_p changes nothing"),
        ({"pad_token_id": -1}, SettingError, "pad_token_id -1 is no token"),
        ({"pad_token_id": 10**6}, SettingError, "pad_token_id 1000000 is no token"),
        ({"max_new_tokens": 0}, SettingError, "max_new_tokens 0 makes nothing"),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, ShapeError, r"shape \(3,\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, ShapeError, r"shape \(1, 0\)"),
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}, MaskError, "padded on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, MaskError, "padded on the left"),
        ({"attention_mask": torch.zeros(2, 3)}, MaskError, "float32"),
        ({"attention_mask": torch.zeros(2, 3, dtype=torch.long)}, MaskError, "padded on the left"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.long)}, MaskError, r"shape \(2, 4\)"),
    ],
)
def test_what_is_refused(model, wrong, error, why):
    with pytest.raises(error, match=why):
        model.generate(**{"input_ids": torch.ones(2, 3, dtype=torch.long), "max_new_tokens": 2, **wrong})
