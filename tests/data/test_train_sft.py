"""train_sft(engine): supervised tokens weigh the same however a batch is split, and eval only measures."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from orbit.data import SFTCollator, build_sft, train_sft
from orbit.engine import Engine
from orbit.objective import CausalLM
from orbit.optim import SAM
from tests.tiny_llm import tiny_llama, tiny_tokenizer

TALK = [
    ("hello", "mali"),
    ("what is the capital ?", "bamako mali bamako"),
    ("when", "6 march 1957"),
    ("hello hello", "6"),
]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def samples(tokenizer, masked=()):
    made = [build_sft(q, a, tokenizer) for q, a in TALK]
    for i in masked:
        made[i]["labels"] = torch.full_like(made[i]["labels"], -100)
    return made


class RunningMean(nn.Module):
    """A causal LM in float64 throughout, as transformers' are not: each position sees the mean so far."""

    def __init__(self, vocabulary):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocabulary, 8).double(), nn.Linear(8, vocabulary).double()

    def forward(self, input_ids, attention_mask):
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head((self.embed(input_ids).cumsum(1) / count).tanh())


def gradient(tokenizer, batch_size, accumulation, masked=()):
    """What one window over all samples leaves in SGD with lr 1: minus the gradient."""
    model = RunningMean(len(tokenizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        plugins=[],
        device="cpu",
        gradient_accumulation_steps=accumulation,
    )
    for _ in engine.train(
        DataLoader(samples(tokenizer, masked), batch_size, collate_fn=SFTCollator(tokenizer))
    ):
        train_sft(engine)
    assert engine.global_step == 1
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("masked", [(), (1,), (0,)], ids=["all supervised", "one masked", "the first masked"])
def test_split_or_whole_the_gradient_is_the_same(tokenizer, masked):
    whole, split = gradient(tokenizer, 4, 1, masked), gradient(tokenizer, 1, 4, masked)
    for name, wanted in whole.items():
        torch.testing.assert_close(split[name], wanted, rtol=1e-10, atol=1e-12)
        assert wanted.abs().max() > 1e-3


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_sam_takes_its_second_pass(tokenizer, rows, accumulation):
    """By hand: the gradient of all samples at w + rho·g/|g|."""
    model, want = RunningMean(len(tokenizer)), RunningMean(len(tokenizer))
    engine = Engine(
        model,
        SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=1.0),
        plugins=[],
        device="cpu",
        gradient_accumulation_steps=accumulation,
    )
    collate = SFTCollator(tokenizer)
    for _ in engine.train(DataLoader(samples(tokenizer), rows, collate_fn=collate)):
        train_sft(engine)

    def slope(net):
        return torch.autograd.grad(CausalLM()(net, collate(samples(tokenizer))).loss, list(net.parameters()))

    climbed, first = RunningMean(len(tokenizer)), slope(want)
    norm = torch.stack([g.norm() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(climbed.parameters(), first, strict=True):
            p += 0.1 * g / norm
    for p, q, g in zip(model.parameters(), want.parameters(), slope(climbed), strict=True):
        torch.testing.assert_close(p, q - g, atol=1e-8, rtol=1e-8)


def test_a_batch_that_does_not_fit_is_split(tokenizer):
    class Small(RunningMean):
        def forward(self, input_ids, attention_mask):
            if len(input_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(input_ids, attention_mask)

    nets = Small(len(tokenizer)), RunningMean(len(tokenizer))
    for net in nets:
        engine = Engine(
            net, torch.optim.SGD(net.parameters(), 1.0), plugins=[], device="cpu", split_on_oom=True
        )
        for _ in engine.train(DataLoader(samples(tokenizer), 4, collate_fn=SFTCollator(tokenizer))):
            train_sft(engine)
    for found, wanted in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


def test_a_tiny_model_learns_its_answers(tokenizer):
    model = tiny_llama(tokenizer)
    engine = Engine(model, torch.optim.Adam(model.parameters(), lr=1e-2), plugins=[], device="cpu")
    losses = []
    for _ in engine.train(
        DataLoader(samples(tokenizer), 2, collate_fn=SFTCollator(tokenizer)), num_epochs=60
    ):
        train_sft(engine)
        losses.append(engine.loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_in_eval_it_measures_the_token_mean_and_changes_nothing(tokenizer):
    model = tiny_llama(tokenizer)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), plugins=[], device="cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {}
    for size in (1, 4):
        for _ in engine.eval(DataLoader(samples(tokenizer), size, collate_fn=SFTCollator(tokenizer))):
            train_sft(engine)
        found[size] = engine.metrics["val_loss"]
    assert found[1] == pytest.approx(found[4], rel=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_under_autocast_the_loss_stays_fp32(tokenizer):
    model = tiny_llama(tokenizer)
    engine = Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), plugins=[], device="cpu", mixed_precision="bf16"
    )
    seen = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    for _ in engine.train(DataLoader(samples(tokenizer), 4, collate_fn=SFTCollator(tokenizer))):
        train_sft(engine)
    assert seen == [torch.bfloat16]
    assert engine.loss.dtype == torch.float32


def test_batches_without_labels_are_refused(tokenizer):
    model = tiny_llama(tokenizer)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), plugins=[], device="cpu")
    loop = engine.train([{"input_ids": torch.ones(1, 3, dtype=torch.int64)}])
    next(loop)
    with pytest.raises(ValueError, match="build_sft"):
        train_sft(engine)
    loop.close()
