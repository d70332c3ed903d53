"""auto_initialize: each kind's scheme by its statistics, and what it must leave alone."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrizations, prune

from orbit import Engine
from orbit.adapter import AdapterConfig, inject
from orbit.model import (
    MoE,
    Transformer,
    TransformerConfig,
    auto_initialize,
    load_layer,
    load_llama_weights,
    save_layer,
)
from orbit.model.errors import SettingError, TargetError
from tests.tiny_llm import tiny_llama, tiny_tokenizer


def spoil(model: nn.Module) -> nn.Module:
    """Fill every parameter and floating-point buffer with 7, so that anything forgotten shows."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
    return model


def test_linear_is_glorot_uniform():
    layer = spoil(nn.Linear(300, 100))
    auto_initialize(layer)
    bound = math.sqrt(6 / 400)
    assert layer.weight.abs().max() <= bound
    torch.testing.assert_close(layer.weight.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0)
    assert layer.bias.count_nonzero() == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(32, 64, 3),
        lambda: nn.Conv1d(64, 64, 5, groups=8),
        lambda: nn.Conv3d(8, 16, 3, dilation=2),
        lambda: nn.ConvTranspose2d(32, 64, 4, stride=2),
        lambda: nn.ConvTranspose1d(64, 32, 6, stride=3, groups=4),
    ],
    ids=["conv2d", "grouped", "dilated3d", "transposed", "transposed-grouped"],
)
def test_a_convolution_and_its_relu_keep_the_second_moment(make):
    """He et al. 2015, eq. 10: E[relu(conv(x))²] = E[x²] away from the border."""
    layer = spoil(make())
    assert auto_initialize(layer).counts == {"conv": 1}
    dims = layer.weight.dim() - 2
    x = torch.randn(8, layer.in_channels, *[{1: 200, 2: 40, 3: 14}[dims]] * dims)
    y = layer(x)
    inner = y[(..., *[slice(6, -6) if dims < 3 else slice(None)] * dims)].relu()
    torch.testing.assert_close(inner.square().mean().item(), 1.0, rtol=0.15, atol=0)
    assert layer.bias.count_nonzero() == 0


def test_embedding_has_a_zero_padding_row():
    model = spoil(nn.ModuleList([nn.Embedding(500, 64, padding_idx=3), nn.EmbeddingBag(500, 64)]))
    assert auto_initialize(model).counts == {"embedding": 2}
    for layer in model:
        torch.testing.assert_close(layer.weight.std().item(), 0.02, rtol=0.05, atol=0)
    assert model[0].weight[3].count_nonzero() == 0
    assert model[1].weight.count_nonzero() > 0.99 * 500 * 64


NORMS = [
    nn.LayerNorm(6),
    nn.RMSNorm(6),
    nn.GroupNorm(2, 6),
    nn.BatchNorm2d(6),
    nn.InstanceNorm1d(6, affine=True),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda n: type(n).__name__)
def test_norms_become_the_identity_scale(norm: nn.Module):
    norm = spoil(copy.deepcopy(norm))
    assert auto_initialize(norm).counts == {"norm": 1}
    state = norm.state_dict()
    assert (state.pop("weight") == 1).all()
    expected = {"bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    for name, value in state.items():
        assert (value == expected[name]).all(), name


def test_norms_without_parameters_are_not_counted_unless_they_have_statistics():
    bare = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm1d(4, affine=False))
    assert auto_initialize(spoil(bare)).counts == {"norm": 1}
    assert (bare[1].running_var == 1).all()


@pytest.mark.parametrize(
    "sizes", [{}, {"kdim": 20, "vdim": 12, "add_bias_kv": True}], ids=["packed", "separate"]
)
def test_attention_projections_are_each_glorot(sizes: dict):
    layer = spoil(nn.MultiheadAttention(48, 4, **sizes))
    assert auto_initialize(layer).counts == {"attention": 1, "linear": 1}  # out_proj is a Linear
    separate = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    for weight in separate if sizes else layer.in_proj_weight.chunk(3):
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.98 * bound
    assert layer.in_proj_bias.count_nonzero() == 0
    assert not any((p == 7).any() for p in layer.parameters())


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell])
def test_recurrent_weights_are_orthogonal_per_gate(cell: type):
    stacked = {"num_layers": 2, "bidirectional": True} if issubclass(cell, nn.RNNBase) else {}
    layer = spoil(cell(12, 8, **stacked))
    assert auto_initialize(layer).counts == {"recurrent": 1}
    for name, p in layer.named_parameters():
        if name.startswith("weight_hh"):
            for gate in p.split(8):
                torch.testing.assert_close(gate @ gate.T, torch.eye(8), rtol=0, atol=1e-5)
        elif name.startswith("weight_ih"):
            assert p.abs().max() <= math.sqrt(6 / (8 + p.shape[1]))
        else:
            forget = torch.zeros_like(p)
            if cell in (nn.LSTM, nn.LSTMCell) and name.startswith("bias_ih"):
                forget[8:16] = 1
            assert torch.equal(p, forget), name


def test_an_lstm_projection_and_half_precision():
    layer = spoil(nn.LSTM(12, 8, proj_size=5).to(torch.bfloat16))
    auto_initialize(layer)
    gate = layer.weight_hh_l0[:8].float()  # (hidden, projection): orthonormal columns
    torch.testing.assert_close(gate.T @ gate, torch.eye(5), rtol=0, atol=0.05)
    assert layer.weight_hr_l0.abs().max() <= math.sqrt(6 / 13) + 1e-2


@pytest.mark.parametrize("head_first", [False, True])
def test_tied_weights_are_set_once_by_the_embedding(head_first: bool):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            if head_first:
                self.head, self.embed = nn.Linear(32, 200), nn.Embedding(200, 32, padding_idx=0)
            else:
                self.embed, self.head = nn.Embedding(200, 32, padding_idx=0), nn.Linear(32, 200)
            self.head.weight = self.embed.weight

    model = spoil(Tied())
    assert auto_initialize(model).counts == {"embedding": 1, "linear": 1}  # the head still owns its bias
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight[1:].std().item(), 0.02, rtol=0.05, atol=0)
    assert model.embed.weight[0].count_nonzero() == 0
    assert model.head.bias.count_nonzero() == 0


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.full((3,), 5.0))
        self.body = nn.Linear(3, 3)


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))


def pruned() -> nn.Module:
    return nn.Sequential(prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5), nn.Linear(3, 3))


@pytest.mark.parametrize("make", [Custom, frozen, parametrized, pruned], ids=lambda f: f.__name__)
def test_what_is_not_plainly_a_known_layer_is_left_alone_and_reported(make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    report = auto_initialize(model)
    assert report.counts == {"linear": 1}
    names = dict(model.named_parameters())
    last = {name for name in names if name.startswith(("body.", "1."))}
    assert set(report.untouched) == set(names) - last
    assert report.untouched
    for name in report.untouched:
        assert torch.equal(names[name], before[name]), name


def test_a_model_where_nothing_could_be_done_says_so():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.warns(UserWarning, match=r"did nothing.*Only.*scale"):
        assert auto_initialize(Only()).counts == {}


def test_missing_storage_is_refused_before_anything_changes():
    lazy = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4))
    before = lazy[0].weight.clone()
    with pytest.raises(ValueError, match=r"1\.weight of LazyLinear has no shape yet.*run model\(example\)"):
        auto_initialize(lazy)
    assert torch.equal(lazy[0].weight, before)
    with pytest.raises(ValueError, match=r"weight of Linear is on the meta device.*to_empty"):
        auto_initialize(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match="takes a torch.nn.Module, not dict"):
        auto_initialize({})


def weights_of(model: nn.Module) -> list[Tensor]:
    auto_initialize(model)
    return [p.detach().clone() for p in model.parameters()]


def test_the_same_seed_gives_the_same_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(), nn.Flatten(), nn.Linear(8, 2))
    torch.manual_seed(1)
    first = weights_of(model)
    torch.manual_seed(1)
    assert all(map(torch.equal, first, weights_of(model)))
    assert (model[2].weight == 0.25).all()


@pytest.mark.gpu
def test_it_initialises_in_place_on_cuda():
    model = spoil(nn.Sequential(nn.LSTM(4, 8), nn.Linear(8, 2)).cuda())
    assert auto_initialize(model).counts == {"recurrent": 1, "linear": 1}
    assert all(p.is_cuda and not (p == 7).any() for p in model.parameters())


MADE = {  # a small layer of every class of torch.nn that owns parameters, or is made of ones that do
    "AdaptiveLogSoftmaxWithLoss": (64, 20, [5, 10]),
    "Bilinear": (3, 4, 5),
    "Embedding": (9, 4),
    "EmbeddingBag": (9, 4),
    "GroupNorm": (2, 6),
    "LayerNorm": (6,),
    "Linear": (3, 4),
    "MultiheadAttention": (8, 2),
    "PReLU": (3,),
    "RMSNorm": (6,),
    "SyncBatchNorm": (6,),
    "Transformer": (8, 2, 1, 1, 16, 0.1, nn.functional.relu, None, None, 1e-5, True),
    "TransformerDecoderLayer": (8, 2, 16),
    "TransformerEncoderLayer": (8, 2, 16),
    **{f"BatchNorm{d}d": (6,) for d in (1, 2, 3)},
    **{f"Conv{d}d": (4, 6, 3) for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": (4, 6, 3) for d in (1, 2, 3)},
    **{f"InstanceNorm{d}d": (6, 1e-5, 0.1, True, True) for d in (1, 2, 3)},
    **dict.fromkeys(("GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"), (4, 6)),
}
WITHOUT = {  # bases that are not made themselves, what is made of given layers, and what holds given tensors
    *("Module", "RNNBase", "RNNCellBase", "Container", "ParameterList", "ParameterDict"),
    *("TransformerEncoder", "TransformerDecoder"),
}


def classes() -> dict[str, type[nn.Module]]:
    return {n: c for n, c in vars(nn).items() if isinstance(c, type) and issubclass(c, nn.Module)}


def test_the_table_holds_every_class_of_torch_that_owns_parameters() -> None:
    makes = {cls for cls in classes().values() if "Parameter(" in inspect.getsource(cls.__init__)} - {
        nn.Module
    }
    makes |= {torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._NormBase}
    own = {
        name
        for name, cls in classes().items()
        if makes.intersection(cls.__mro__) and not issubclass(cls, LazyModuleMixin)
    }
    assert own - MADE.keys() - WITHOUT == set()
    assert len(own) > 25


@pytest.mark.parametrize("name", MADE)
def test_nothing_of_a_layer_of_torch_is_forgotten(name: str) -> None:
    layer = spoil(classes()[name](*MADE[name]))
    report = auto_initialize(layer)
    assert report.untouched == {}
    for key, value in layer.state_dict().items():
        assert not (value == 7).any(), key


@pytest.mark.parametrize("name", sorted(n for n in classes() if n.startswith("Lazy")))
def test_lazy_layers_are_refused(name: str) -> None:
    arguments = {"LazyLinear": (2,)}.get(name, () if "Norm" in name else (2, 3))
    lazy = classes()[name](*arguments)
    with pytest.raises(ValueError, match="has no shape yet"):
        auto_initialize(lazy)


class Experts(nn.Module):
    """Two stacked experts that say how they begin."""

    initialized_as = "experts"

    def __init__(self, padded: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(2, 3, 4))
        self.down = nn.Parameter(torch.empty(2, 4, 3))
        self.register_buffer("uses", torch.empty(2))
        self.router = nn.Linear(4, 2)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.up, 0.5)
        nn.init.constant_(self.down, 0.25)
        self.uses.zero_()


def test_a_block_that_offers_a_rule_is_initialised_by_it() -> None:
    model = nn.Sequential(spoil(Experts()), spoil(Experts()).requires_grad_(False))
    report = auto_initialize(model, residual="0.down", keep="1.router.weight")
    assert report.counts == {"experts": 1, "linear": 1}
    assert (model[0].up == 0.5).all()
    assert (model[0].uses == 0).all()
    assert report.scaled == {"0.down": 1.0}
    assert report.untouched == {
        **dict.fromkeys(("1.up", "1.down", "1.router.bias"), "frozen"), "1.router.weight": "kept",
    }  # fmt: skip
    auto_initialize(model, residual="down", residual_depth=16)
    assert (model[0].down == 0.25 / 4).all()


def decoder(layers: int = 4) -> nn.Module:
    block = {"o_proj": nn.Linear(32, 32), "up_proj": nn.Linear(32, 32), "down_proj": nn.Linear(32, 32)}
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict(copy.deepcopy(block)) for _ in range(layers))}
    )


def test_residual_scaling_is_one_over_the_root_of_the_number_of_writes() -> None:
    model, plain = decoder(), decoder()
    torch.manual_seed(0)
    report = auto_initialize(model, residual=("o_proj", "down_proj"))
    torch.manual_seed(0)
    auto_initialize(plain)
    assert report.scaled == {
        f"layers.{i}.{n}.weight": 1 / math.sqrt(8) for i in range(4) for n in ("o_proj", "down_proj")
    }
    for name, value in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), value * report.scaled.get(name, 1.0)), name
    assert str(report) == (
        "initialised 12 linear\nscaled 8 by 0.354: layers.0.o_proj.weight, layers.0.down_proj.weight, ..."
    )
    assert set(auto_initialize(model, residual="*.o_proj", residual_depth=16).scaled.values()) == {0.25}


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (
            {"residual": "o_porj"},
            TargetError,
            r"'o_porj' matches nothing in ModuleDict; did you mean 'o_proj'\?",
        ),
        (
            {"residual": "layers.0"},
            TargetError,
            r"names 'layers\.0', a ModuleDict without a weight of its own",
        ),
        ({"residual_depth": 2}, SettingError, "residual_depth=2: .* residual= must name"),
        (
            {"residual": "o_proj", "residual_depth": 0},
            SettingError,
            "residual_depth=0: it must be at least 1",
        ),
        ({"keep": ["layers.0", "layers.7"]}, TargetError, r"'layers\.7' matches nothing"),
    ],
)
def test_settings_that_mean_nothing_change_nothing(settings, error, says) -> None:
    model = spoil(decoder())
    with pytest.raises(error, match=says):
        auto_initialize(model, **settings)
    assert all((p == 7).all() for p in model.parameters())


def test_what_load_layer_loaded_stays_unless_told(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return spoil(
            nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.Linear(2, 2)
            )
        )

    for layer in "012":
        save_layer(net(), layer, tmp_path / layer)
    model = net()
    for layer in "012":
        load_layer(model, layer, tmp_path / layer)
    model = copy.deepcopy(model)
    report = auto_initialize(model)
    assert report.counts == {"linear": 1}
    assert report.untouched == dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias"), "loaded")
    assert all((v == 7).all() for v in (model[0].weight, model[1].running_mean, model[2].running_var))
    assert auto_initialize(model, overwrite_loaded=True).counts == {"conv": 1, "norm": 2, "linear": 1}
    assert not any((v == 7).any() for v in model.state_dict().values())


def test_half_a_loaded_layer_and_a_tied_head(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    save_layer(spoil(model), "embed", tmp_path / "embed")
    load_layer(model, "embed", tmp_path / "embed")
    report = auto_initialize(model)
    assert report.counts == {"linear": 1}
    assert report.untouched == {"embed.weight": "loaded"}
    assert (model["head"].weight == 7).all()
    assert (model["head"].bias == 0).all()


def test_what_transformers_loaded_stays_and_its_new_head_does_not(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel, LlamaForSequenceClassification

    tiny_llama(tiny_tokenizer()).save_pretrained(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    report = auto_initialize(model)
    assert report.counts == {"linear": 1}
    assert set(report.untouched.values()) == {"loaded"}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"score.weight"}

    fresh = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    assert auto_initialize(fresh).counts["linear"] > 5


def test_a_decoder_scales_its_residual_writes_and_keeps_the_weights_of_a_llama() -> None:
    llama = tiny_llama(tiny_tokenizer())
    model = Transformer(TransformerConfig.from_llama(llama.config))
    report = auto_initialize(spoil(model), residual=("o_proj", "down_proj"))
    assert report.untouched == {}
    assert set(report.scaled.values()) == {1 / math.sqrt(2 * model.config.num_layers)}
    load_llama_weights(model, llama)
    with pytest.warns(UserWarning, match=r"did nothing.*loaded"):
        assert set(auto_initialize(model).untouched.values()) == {"loaded"}


def test_a_checkpoint_that_orbit_restored_is_loaded(tmp_path: Path) -> None:
    def engine() -> Engine:
        model = nn.Linear(2, 2)
        return Engine(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), plugins=[],
            checkpoint_dir=tmp_path, device="cpu",
        )  # fmt: skip

    first, second = engine(), engine()
    batches = [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))]
    for run in (first, second):
        for _ in run.train(batches, num_epochs=1):
            run.auto_update()
    assert first.global_step == second.global_step == 1
    assert set(auto_initialize(first.model).untouched) == set()
    with pytest.warns(UserWarning, match=r"did nothing.*weight, \.\.\.: loaded"):
        auto_initialize(second.model)
    assert (second.model.weight != 0).all()


def test_adapters_stay_and_wrappers_are_seen_through() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inject(inner, AdapterConfig(r=2, targets=("0",), save_modules=("1",)))
    inner.requires_grad_(True)
    before = {name: p.clone() for name, p in inner.named_parameters() if ".lora_" in name}
    report = auto_initialize(torch.compile(inner, backend="eager"))
    assert report.counts == {"linear": 2}
    assert report.untouched == dict.fromkeys(before, "attached to the model")
    assert all(torch.equal(inner.get_parameter(name), value) for name, value in before.items())


def test_a_mixture_of_experts_is_initialised_whole() -> None:
    model = nn.ModuleList(spoil(MoE(8, 16, num_experts=4, top_k=2)) for _ in range(3))
    report = auto_initialize(model, residual="experts.down_proj")
    assert report.untouched == {}
    assert report.counts == {"experts": 3, "gate": 3}
    assert list(report.scaled.values()) == [1 / math.sqrt(3)] * 3
    assert not any((p == 7).any() for p in model.parameters())
