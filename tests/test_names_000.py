"""Every name that document 000 mentions: it is at the path that the document gives, and it does what is said of it.

The names are read from the document's list of features (`documents/000_features.md`) and from the import lines of its
snippets. `CALLS` has one small real call for each.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from orbit import adapter
from orbit.engine import Engine
from tests import tiny
from tests.tiny_llm import tiny_llama, tiny_tokenizer

DOCUMENTS = Path(__file__).parent / "documents"
TORCHS = (
    "Linear",
    "Conv1d",
    "Conv2d",
    "Embedding",
)  # "LoRA across ... layers": the layers of the path are adapted ones
ENGINES = ("train", "eval", "auto_update", "update")
WITHOUT_BACKTICKS = {"MoE": "orbit.model", "Muon": "orbit.optim", "SAM": "orbit.optim"}


def features() -> Iterator[tuple[str, str]]:
    """(path, name) of every name in the list of features; a heading gives the path of what is below it."""
    paths: dict[int, str] = {}
    for line in (DOCUMENTS / "000_features.md").read_text().partition("## Features")[2].splitlines():
        if line.startswith("#"):
            level = line.index(" ")
            given = re.search(r"`([\w.]+)`", line)
            paths = {at: path for at, path in paths.items() if at < level} | (
                {level: given[1]} if given else {}
            )
        for name in re.findall(r"`(\w[\w.]*)[^`]*`", line):
            if not name.startswith("orbit."):
                yield paths[max(paths)] if paths else "orbit.engine.Engine", name
    yield from ((path, name) for name, path in WITHOUT_BACKTICKS.items())


def imported() -> Iterator[tuple[str, str]]:
    """(path, name) of what the snippets import from orbit."""
    for path, names in re.findall(
        r"^from (orbit\S*) import (.+)$", (DOCUMENTS / "000.md").read_text(), re.MULTILINE
    ):
        yield from ((path, name) for name in names.split(", "))


NAMES = list(dict.fromkeys([*features(), *imported()]))


def find(path: str, name: str) -> Any:
    """What stands at the path that the document gives."""
    if name == "max_split_size_mb":  # a setting that cuda_alloc makes
        name = "cuda_alloc"
    module, _, owner = path.rpartition(".") if path[path.rindex(".") + 1].isupper() else (path, "", "")
    found = importlib.import_module(module)
    return getattr(getattr(found, owner) if owner else found, f"{name}LoRA" if name in TORCHS else name)


# ── models and data of the calls ──────────────────────────────────────────────────────────────────────────────────


def net() -> nn.Module:
    return nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)}
    )


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    adapter.inject(model, adapter.AdapterConfig(r=2, targets=("0",)))
    return model


def trained(*plugins: Any, epochs: int = 1, **options: Any) -> Engine:
    """A tiny run with these plugins, evaluated after each epoch."""
    model = tiny.model()
    options = {"device": "cpu", "plugins": list(plugins), **options}
    engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), **options)
    for _ in engine.train(tiny.loader(), num_epochs=epochs):
        engine.auto_update()
        if engine.is_epoch_end:
            for _ in engine.eval(tiny.loader()):
                engine.auto_update()
    return engine


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def gives(gate: nn.Module, *inputs: Tensor, shape: tuple[int, ...]) -> None:
    output = gate(*inputs)
    assert output.shape == shape
    assert output.isfinite().all()
    output.sum().backward()


# ── the calls ─────────────────────────────────────────────────────────────────────────────────────────────────────

Call = Callable[[Any, Path], object]
CALLS: dict[str, Call] = {}


def call(*names: str) -> Callable[[Call], Call]:
    def put(function: Call) -> Call:
        CALLS.update(dict.fromkeys(names, function))
        return function

    return put


@call("Engine", "train", "eval", "auto_update")
def _(found: Any, path: Path) -> None:
    engine = trained()
    assert engine.global_step == len(tiny.loader())
    assert {"train_loss", "val_loss", "val_acc"} <= engine.metrics.keys()
    assert found is Engine or found is getattr(Engine, found.__name__)


@call("update")
def _(update: Any, path: Path) -> None:
    model = nn.Linear(8, 1)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), plugins=[], device="cpu")
    before = values(model)
    for _ in engine.train([torch.ones(3, 8)]):
        update(engine, mse_loss(model(engine.batch), torch.ones(3, 1)))
    assert changed(model, before) == {"weight", "bias"}


@call("MultiHeadAttention")
def _(MultiHeadAttention: Any, path: Path) -> None:
    from orbit.model import RotaryPositionalEmbedding

    gives(
        MultiHeadAttention(32, 4, num_kv_heads=2, rope=RotaryPositionalEmbedding(8), causal=True),
        torch.randn(2, 5, 32), shape=(2, 5, 32),
    )  # fmt: skip


@call("MLP")
def _(MLP: Any, path: Path) -> None:
    for gated in (False, True):
        gives(MLP(8, 16, gated=gated), torch.randn(2, 5, 8), shape=(2, 5, 8))


@call("MoE")
def _(MoE: Any, path: Path) -> None:
    gives(MoE(8, 16, num_experts=4, top_k=2), torch.randn(2, 5, 8), shape=(2, 5, 8))


@call("TopKGate")
def _(TopKGate: Any, path: Path) -> None:
    weights, indices, logits = TopKGate(8, num_experts=4, k=2)(torch.randn(3, 8))
    assert torch.equal(indices, logits.topk(2).indices)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))


@call("SigmoidGate", "TanhGate", "SoftmaxGate")
def _(Gate: Any, path: Path) -> None:
    low, high = {"TanhGate": (-1, 1)}.get(Gate.__name__, (0, 1))
    gate, x = Gate(8, 6), torch.randn(2, 5, 8)
    gives(gate, x, shape=(2, 5, 6))
    assert low <= gate(x).min() < gate(x).max() <= high


@call("GLUGate")
def _(GLUGate: Any, path: Path) -> None:
    gives(GLUGate(8, 6), torch.randn(2, 5, 8), shape=(2, 5, 6))


@call("ContextGate")
def _(ContextGate: Any, path: Path) -> None:
    gives(ContextGate(8, 3), torch.randn(2, 5, 8), torch.randn(2, 3), shape=(2, 5, 8))


@call("FiLM")
def _(FiLM: Any, path: Path) -> None:
    gives(FiLM(3, 8, channel_dim=1), torch.randn(2, 8, 4, 4), torch.randn(2, 3), shape=(2, 8, 4, 4))


@call("RotaryPositionalEmbedding")
def _(RotaryPositionalEmbedding: Any, path: Path) -> None:
    from orbit.model import rotate

    q_BHTD = torch.randn(1, 2, 5, 8)
    turned = rotate(q_BHTD, RotaryPositionalEmbedding(8)(torch.arange(5)))
    assert torch.equal(turned[:, :, 0], q_BHTD[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), q_BHTD.norm(dim=-1))


@call(*TORCHS)
def _(Layer: Any, path: Path) -> None:
    arguments, x = {
        "LinearLoRA": ((4, 6), torch.randn(2, 4)), "EmbeddingLoRA": ((9, 6), torch.tensor([1, 2])),
        "Conv1dLoRA": ((4, 6, 3), torch.randn(2, 4, 5)), "Conv2dLoRA": ((4, 6, 3), torch.randn(2, 4, 5, 5)),
    }[Layer.__name__]  # fmt: skip
    for settings in ({}, {"dora": True}, {"gated": True}):
        layer = Layer(*arguments, r=2, **settings)
        layer(x).sum().backward()
        assert layer.weight.grad is None
        assert any(p.grad is not None for p in layer.parameters())


@call("inject_lora")
def _(inject_lora: Any, path: Path) -> None:
    model = inject_lora(net(), r=2, target_names=["encoder"], dora=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"encoder.{i}.lora_{part}.default.weight" for i in (0, 1) for part in ("A", "B", "magnitude")
    }


@call("inject_lora_file", "save_lora", "load_lora")
def _(found: Any, path: Path) -> None:
    from orbit.utils import inject_lora_file, load_lora, save_lora

    model, x = adapted(), torch.randn(3, 4)
    with torch.no_grad():
        model[0].lora_B.get("default").weight.fill_(0.5)
    base = {name: value for name, value in model.state_dict().items() if "lora" not in name}
    file = save_lora(model, path / "lora.safetensors")
    assert file.stat().st_size < 10_000
    for load, other in (
        (inject_lora_file, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))),
        (load_lora, adapted()),
    ):
        other.load_state_dict(base, strict=False)
        assert torch.equal(load(other, file)(x), model(x))


@call("merge_lora", "unmerge_lora")
def _(found: Any, path: Path) -> None:
    from orbit.utils import merge_lora, unmerge_lora

    model, x = adapted(), torch.randn(3, 4)
    with torch.no_grad():
        model[0].lora_B.get("default").weight.fill_(0.5)
    before, output = model[0].weight.clone(), model(x)
    merge_lora(model.eval())
    assert not torch.equal(model[0].weight, before)
    torch.testing.assert_close(model(x), output)
    unmerge_lora(model)
    assert torch.equal(model[0].weight, before)


@call("freeze_backbone_only")
def _(freeze_backbone_only: Any, path: Path) -> None:
    model = freeze_backbone_only(adapted().requires_grad_(True), unlock_head_keywords=["1"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.lora_A.default.weight", "0.lora_B.default.weight", "1.weight", "1.bias",
    }  # fmt: skip


@call("LoRADiagnoser")
def _(LoRADiagnoser: Any, path: Path) -> None:
    model = adapted()
    model(torch.randn(3, 4)).sum().backward()
    assert [finding.rule for finding in LoRADiagnoser(model).report().findings] == ["dead"]


@call("freeze_layers", "unfreeze_layers", "get_trainable_params")
def _(found: Any, path: Path) -> None:
    from orbit.utils import freeze_layers, get_trainable_params, unfreeze_layers

    model = net()
    freeze_layers(model, targets=["enc*"])
    assert get_trainable_params(model) == list(model["head"].parameters())
    unfreeze_layers(model, ["encoder.1"])
    assert len(get_trainable_params(model)) == 4


@call("make_causal_mask", "make_lookahead_mask", "make_sliding_window_mask", "make_padding_mask")
def _(make: Any, path: Path) -> None:
    rows = {
        "make_causal_mask": lambda: make(3),
        "make_lookahead_mask": lambda: make(3, lookahead=1),
        "make_sliding_window_mask": lambda: make(3, window=1),
        "make_padding_mask": lambda: make(torch.tensor([[5, 5, 0]]), pad_id=0),
    }[make.__name__]()
    wanted = {
        "make_causal_mask": [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        "make_lookahead_mask": [[1, 1, 0], [1, 1, 1], [1, 1, 1]],
        "make_sliding_window_mask": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "make_padding_mask": [[1, 1, 0]],
    }[make.__name__]
    assert torch.equal(rows.reshape(-1, 3), torch.tensor(wanted).bool())
    q = torch.randn(1, 1, 3, 4)
    assert nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=rows).isfinite().all()


@call("save_layer", "load_layer", "get_model_by_name")
def _(found: Any, path: Path) -> None:
    from orbit.utils import get_model_by_name, load_layer, save_layer

    source, model = net(), net()
    before = values(model)
    save_layer(source, "encoder.1", path / "layer.safetensors")
    load_layer(model, "encoder.1", path / "layer.safetensors")
    assert changed(model, before) == {"encoder.1.weight", "encoder.1.bias"}
    assert torch.equal(get_model_by_name(model, "encoder.1").weight, source["encoder"][1].weight)


@call("build_sft", "train_sft")
def _(found: Any, path: Path) -> None:
    from orbit.data import SFTCollator
    from orbit.utils import build_sft, train_sft

    tokenizer = tiny_tokenizer()
    sample = build_sft("what is the capital of mali ?", "bamako", tokenizer)
    assert (sample["labels"] == -100).any()
    assert (sample["labels"] != -100).any()
    model = tiny_llama(tokenizer)
    engine = Engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), plugins=[], device="cpu")
    batch = SFTCollator(tokenizer)([sample])
    losses = []
    for _ in engine.train([batch] * 4):
        train_sft(engine)
        losses.append(float(engine.loss))
    assert losses[-1] < losses[0]


@call("Muon")
def _(Muon: Any, path: Path) -> None:
    model = tiny.model()
    optimizer = Muon(model.parameters(), lr=0.02)
    before = values(model)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert {name for name, _ in model.named_parameters()} <= changed(model, before)


@call("SAM")
def _(SAM: Any, path: Path) -> None:
    model = nn.Linear(8, 3)
    engine = Engine(
        model,
        SAM(model.parameters(), torch.optim.SGD, lr=0.1),
        nn.CrossEntropyLoss(),
        plugins=[],
        device="cpu",
    )
    for _ in engine.train(tiny.loader(), num_epochs=5):
        engine.auto_update()
    assert engine.metrics["train_loss"] < 1.0


@call("auto_initialize")
def _(auto_initialize: Any, path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2), nn.Embedding(4, 2)
    )
    before = values(model)
    assert auto_initialize(model).counts == {"embedding": 1, "conv": 1, "norm": 1, "linear": 1}
    assert {"0.weight", "3.weight", "4.weight"} <= changed(model, before)


@call("seed_everything")
def _(seed_everything: Any, path: Path) -> None:
    seed_everything(42)
    first = torch.rand(3)
    seed_everything(42)
    assert torch.equal(torch.rand(3), first)


@call("cuda_alloc", "max_split_size_mb")
def _(cuda_alloc: Any, path: Path) -> None:
    assert "max_split_size_mb:64" in cuda_alloc(64)
    assert "max_split_size_mb:64" in os.environ["PYTORCH_ALLOC_CONF"]


@call("EarlyStopping")
def _(EarlyStopping: Any, path: Path) -> None:
    engine = trained(EarlyStopping(monitor="val_acc", patience=1, min_delta=2.0, verbose=False), epochs=9)
    assert engine.epoch < 8
    assert engine.state.stop[0] == "EarlyStopping"


@call("GradientAccumulation")
def _(GradientAccumulation: Any, path: Path) -> None:
    assert trained(GradientAccumulation(steps=2)).global_step == -(-len(tiny.loader()) // 2)


@call("Warmup")
def _(Warmup: Any, path: Path) -> None:
    steps = len(tiny.loader())
    assert trained(Warmup(warmup_steps=100)).step_info["lr"] == [pytest.approx(1e-2 * steps / 100)]


@call("Mentor")
def _(Mentor: Any, path: Path) -> None:
    mentor, model = Mentor(patience=2, verbose=False), nn.Linear(8, 3)
    stuck = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = Engine(model, stuck, nn.CrossEntropyLoss(), plugins=[mentor], device="cpu")
    for _ in engine.train([(torch.ones(4, 8), torch.arange(4) % 3)], num_epochs=4):
        engine.auto_update()
    assert mentor.verdicts[0].kind == "plateau"


@call("MemoryEstimator")
def _(MemoryEstimator: Any, path: Path) -> None:
    estimator = MemoryEstimator(verbose=False)
    trained(estimator)
    assert estimator.memory.peak > 0


@call("LoRA")
def _(LoRA: Any, path: Path) -> None:
    engine = trained(LoRA(target_names=["0"], r=2, dora=True))
    assert adapter.tasks(engine.model) == ("default",)


@call("Board")
def _(Board: Any, path: Path) -> None:
    pytest.importorskip("tensorboard", reason='pip install "orbit-torch[board]"')
    trained(Board(path / "board", interval=1))
    assert list((path / "board").rglob("events.out.tfevents.*"))


@call("ChatInterface")
def _(ChatInterface: Any, path: Path) -> None:
    tokenizer = tiny_tokenizer()
    chat = ChatInterface(model=tiny_llama(tokenizer), tokenizer=tokenizer, device="cpu")
    assert isinstance(chat.respond("hello", max_new_tokens=2), str)


@pytest.mark.parametrize(("where", "name"), NAMES, ids=lambda part: part)
def test_every_name_of_document_000_is_there_and_runs(
    where: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # put back afterwards
    CALLS[name](find(where, name), tmp_path)


def test_the_list_was_read() -> None:
    names = [name for _, name in NAMES]
    assert len(names) == len(set(names)) >= 50
    assert ("orbit.model", "TopKGate") in NAMES
    assert ("orbit.utils", "cuda_alloc") in NAMES
    assert ("orbit.kit", "ChatInterface") in NAMES
    assert set(CALLS) == set(names)
