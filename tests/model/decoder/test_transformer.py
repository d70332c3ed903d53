"""The decoder: cache, masks, loss, and its life in the rest of the library. Its numbers are test_llama.py's."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from orbit import adapter
from orbit.data import SFTCollator
from orbit.engine import Engine
from orbit.model import CacheError, MaskError, ShapeError, Transformer, TransformerConfig, moe_aux_loss
from orbit.objective import CausalLM
from orbit.plugin import GradientAccumulation
from orbit.utils import train_sft
from tests.model.decoder.llamas import llama, ours, prompts
from tests.tiny_llm import tiny_tokenizer

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "init_std": 0.2,
}


def decoder(seed=0, **settings):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**{**SIZES, **settings})).eval()


@pytest.mark.parametrize("settings", [{}, {"window": 4, "qk_norm": True}, {"num_experts": 4}], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_a_cache_in_chunks_gives_the_logits_of_the_whole(settings, padding):
    model = decoder(**settings)
    ids, mask = prompts(length=14, padding=padding)
    whole = model(ids, mask).logits
    for chunks in ([14], [1] * 14, [6, 1, 5, 2]):
        cache, start, parts = model.make_cache(), 0, []
        for size in chunks:
            parts.append(model(ids[:, start : start + size], mask[:, : start + size], cache=cache).logits)
            start += size
        real = mask.bool()
        torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-5, rtol=0)


def test_padding_changes_no_real_token():
    model = decoder()
    ids, mask = prompts(length=12, padding=4)
    alone = model(ids[:1, 4:]).logits
    left = model(ids, mask).logits[:1, 4:]
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=0)
    right = torch.nn.functional.pad(ids[:1, 4:], (0, 3)), torch.tensor([[1] * 8 + [0] * 3])
    torch.testing.assert_close(model(*right).logits[:, :8], alone, atol=1e-5, rtol=0)
    boolean = mask.bool()
    torch.testing.assert_close(model(ids, boolean).logits, model(ids, mask).logits, atol=0, rtol=0)


def test_positions_turn_queries_and_keys():
    model = decoder()
    ids, _ = prompts()
    default = model(ids).logits
    far = torch.arange(12)[None] + torch.tensor([[0], [7]])
    torch.testing.assert_close(model(ids, positions=far).logits, default, atol=1e-5, rtol=0)
    assert not torch.allclose(model(ids, positions=2 * torch.arange(12)).logits, default, atol=1e-3)


def test_logits_of_some_columns():
    model = decoder()
    ids, _ = prompts()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 5])).logits, whole[:, [2, 5]])


def test_loss_is_the_mean_of_supervised_tokens():
    model = decoder()
    ids, _ = prompts()
    labels = ids.clone()
    labels[0, :9] = -100
    by_hand = [
        -model(ids).logits[b, t].log_softmax(-1)[labels[b, t + 1]]
        for b in range(2)
        for t in range(11)
        if labels[b, t + 1] != -100
    ]
    assert len(by_hand) == 3 + 11
    torch.testing.assert_close(model(ids, labels=labels).loss, torch.stack(by_hand).mean())
    nothing = model(ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert nothing == 0
    assert model.bfloat16()(ids, labels=labels).loss.dtype == torch.float32


def test_the_experts_balance_joins_the_loss_in_training():
    model = decoder(num_experts=4, balance_weight=0.5)
    ids, _ = prompts()
    plain = model(ids, labels=ids)
    assert plain.added_loss is None
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.added_loss, moe_aux_loss(model, balance=0.25))
    torch.testing.assert_close(trained.loss, plain.loss + trained.added_loss)
    outcome = CausalLM()(model, {"input_ids": ids, "labels": ids})
    torch.testing.assert_close(outcome.loss, trained.loss)
    assert model.eval()(ids).added_loss is None
    unbalanced = CausalLM()(model, {"input_ids": ids, "labels": ids}).loss
    torch.testing.assert_close(unbalanced, plain.loss)


def test_padding_takes_no_part_in_the_balance():
    model = decoder(num_experts=4).train()
    ids, mask = prompts(padding=6)
    before = model(ids, mask).added_loss
    ids[0, :6] = 9
    torch.testing.assert_close(model(ids, mask).added_loss, before)


def test_first_weights():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(500, 128, num_layers=8, num_heads=4, num_experts=2, init_std=0.02))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
        elif not name.endswith("gate.weight"):
            wanted = 0.02 / (math.sqrt(16) if name.endswith(("o_proj.weight", "down_proj")) else 1)
            assert parameter.std().item() == pytest.approx(wanted, rel=0.03), name
    loss = model(torch.arange(64)[None], labels=torch.arange(64)[None]).loss.item()
    assert loss == pytest.approx(math.log(500), rel=0.03), "it starts by knowing nothing"


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"input_ids": torch.ones(3, dtype=torch.long)}, ShapeError, r"input_ids of shape \(3,\)"),
        ({"input_ids": torch.ones(1, 3)}, ShapeError, "float32: integers"),
        ({"labels": torch.ones(1, 4, dtype=torch.long)}, ShapeError, r"labels \(1, 4\) must have the shape"),
        (
            {"labels": torch.ones(1, 3, dtype=torch.long), "logits_to_keep": 1},
            ShapeError,
            "logits of all columns",
        ),
        ({"logits_to_keep": -1}, ShapeError, "logits_to_keep -1 keeps no columns"),
        ({"attention_mask": torch.ones(1, 3)}, MaskError, "float32: 1 for tokens"),
        ({"attention_mask": torch.ones(1, 4, dtype=torch.long)}, MaskError, "does not fit"),
        ({"cache": []}, CacheError, "the cache has 0 layers and the model 2"),
        ({"input_ids": torch.ones(1, 9, dtype=torch.long)}, ShapeError, "9 tokens exceeds max_length 8"),
        ({"positions": torch.arange(4)}, ShapeError, "positions"),
    ],
)
def test_what_is_refused(given, error, why):
    model = decoder(max_length=8)
    with pytest.raises(error, match=why):
        model(**{"input_ids": torch.ones(1, 3, dtype=torch.long), **given})


def test_a_cache_that_a_failed_forward_left_half_filled_is_refused():
    model, ids = decoder(), torch.randint(11, (2, 5))
    cache = model.make_cache()
    model(ids, cache=cache)
    broken = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, :1], cache=cache)
    broken.remove()
    with pytest.raises(CacheError, match=r"hold \[6, 5\] tokens: .*Crop each to 5"):
        model(ids[:, :1], cache=cache)
    for layer in cache:
        layer.crop(5)
    found = model(ids[:, :1], cache=cache).logits
    torch.testing.assert_close(found, model(torch.cat((ids, ids[:, :1]), 1)).logits[:, -1:])


def test_a_cache_counts_towards_the_longest_text():
    model = decoder(max_length=8)
    cache = model.make_cache()
    model(torch.ones(1, 6, dtype=torch.long), cache=cache)
    with pytest.raises(ShapeError, match="9 tokens exceeds"):
        model(torch.ones(1, 3, dtype=torch.long), cache=cache)
    assert cache[0].length == 6


# ── with the rest of the library ──────────────────────────────────────────────────────────────────────────────────


def samples(count=6):
    draw = torch.Generator().manual_seed(5)
    for length in range(4, 4 + count):
        ids = torch.randint(1, 28, (length,), generator=draw)
        yield {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < 2, -100)}


def trained(batch_size, **settings):
    model = decoder(vocab_size=28, **settings).double()
    loader = DataLoader(list(samples()), batch_size=batch_size, collate_fn=SFTCollator(tiny_tokenizer()))
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        plugins=[GradientAccumulation(steps=6 // batch_size)],
        device="cpu",
    )
    for _ in engine.train(loader, num_epochs=2):
        train_sft(engine)
    assert engine.global_step == 2
    return model


def test_it_trains_under_engine_and_micro_batches_weigh_their_tokens():
    whole, split = trained(6), trained(1)
    fresh = decoder(vocab_size=28).double()
    for (name, one), other, first in zip(
        whole.named_parameters(), split.parameters(), fresh.parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10, msg=name)
        assert not torch.equal(one, first), name


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": True}, {"compile": {"backend": "aot_eager"}}]
)
def test_checkpointed_and_compiled_blocks_train_the_same(options):
    torch.compiler.reset()

    def run(**options):
        model = decoder(vocab_size=28)
        loader = DataLoader(list(samples(2)), batch_size=2, collate_fn=SFTCollator(tiny_tokenizer()))
        engine = Engine(
            model, torch.optim.SGD(model.parameters(), lr=0.5), device="cpu", plugins=[], **options
        )
        for _ in engine.train(loader, num_epochs=2):
            train_sft(engine)
        return model

    for one, other in zip(run().parameters(), run(**options).parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_lie_on_all_linear_layers_but_the_head(tied):
    model = decoder(tie_embeddings=tied)
    ids, _ = prompts()
    before = model(ids).logits
    report = adapter.inject(model, adapter.AdapterConfig(r=2), name="a")
    assert report is not None
    layers = {
        name.rpartition(".lora_A")[0] for name in adapter.adapter_parameters(model, "a") if "lora_A" in name
    }
    assert layers == {
        f"model.layers.{n}.{part}"
        for n in range(2)
        for part in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    }
    assert torch.equal(model(ids).logits, before)
    with torch.no_grad():
        for parameter in adapter.adapter_parameters(model, "a").values():
            parameter.normal_()
    adapted = model(ids, task="a").logits
    assert not torch.allclose(adapted, before)
    assert torch.equal(model(ids, task=None).logits, before)
    torch.testing.assert_close(model(ids, task=["a", None]).logits, torch.stack((adapted[0], before[1])))
    with adapter.route(model, None):
        base = model.generate(ids, max_new_tokens=8)
    assert not torch.equal(model.generate(ids, max_new_tokens=8), base)
    adapter.merge(model)
    torch.testing.assert_close(model(ids).logits, adapted, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_a_llama_fits_and_one_of_ours_fits_a_llama(tmp_path):
    theirs = llama()
    ids, mask = prompts()
    model = ours(theirs)
    for source, target in ((theirs, model), (model, theirs)):
        name = type(source).__name__
        adapter.inject(source, adapter.AdapterConfig(r=2, dora=True), name=name)
        with torch.no_grad():
            for parameter in adapter.adapter_parameters(source, name).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
        adapter.save(source, tmp_path / name, name)
        adapter.load(target, tmp_path / name, name=name)
        with adapter.route(source, name), adapter.route(target, name), torch.no_grad():
            one, other = source(ids, attention_mask=mask).logits, target(ids, attention_mask=mask).logits
        with adapter.route(source, None), torch.no_grad():
            base = source(ids, attention_mask=mask).logits
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        assert (one - base).abs().max() > 0.1
        for each in (source, target):
            adapter.remove(each, name)


def test_tied_weights_are_one_parameter_also_without_storage():
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**SIZES, tie_embeddings=True))
    model.to_empty(device="cpu")
    model.reset_parameters()
    names = [name for name, _ in model.named_parameters()]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    ids, _ = prompts()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model.get_output_embeddings(), nn.Embedding)


@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"num_experts": 4}], ids=str)
def test_texts_in_one_row_have_the_logits_that_they_have_alone(settings):
    model = decoder(**settings)
    ids, _ = prompts(length=10, padding=0)
    position_ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0]).expand(len(ids), -1)
    packed = model(ids, position_ids=position_ids).logits
    alone = torch.cat([model(part).logits for part in ids.split([4, 5, 1], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed, model(ids, positions=position_ids).logits, atol=1e-2)
    mask = torch.ones_like(ids)
    assert torch.equal(
        model(ids, mask, position_ids=position_ids).logits, model(ids, mask, positions=position_ids).logits
    )


def test_position_ids_that_do_not_fit():
    model, ids = decoder(), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="position_ids"):
        model(ids, position_ids=torch.arange(3))
    with pytest.raises(ShapeError, match="in place of positions"):
        model(ids, position_ids=ids, positions=torch.arange(3))
