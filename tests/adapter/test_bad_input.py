"""Bad input, in one table: a typed error within 2 s that names the value and the way out, and nothing has changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    AdapterError,
    AdapterFileError,
    ConfigError,
    MergeError,
    RouteError,
    TargetError,
    TaskError,
    adapter_parameters,
    combine,
    current_route,
    inject,
    load,
    merge,
    merged,
    remove,
    rename,
    route,
    save,
    set_route,
    task_config,
    tasks,
)
from orbit.adapter.files import CONFIG, WEIGHTS


class Tied(nn.Module):
    """Two layers, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.fc = nn.Linear(6, 8)
        self.back = nn.Linear(8, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.back(self.fc(self.embed(ids)).relu()))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture
def model() -> Tied:
    """With a task "a" of fc and back, trained a little, and a task "tied" of the head."""
    torch.manual_seed(0)
    model = Tied().eval()
    inject(model, AdapterConfig(r=2, targets=("head",)), "tied")
    inject(model, AdapterConfig(r=2, targets=("fc", "back")), "a")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def everything(model: nn.Module) -> dict[str, Any]:
    """What a refusal may not change."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "hooks": {
            name: (len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        },
        "tasks": {name: task_config(model, name) for name in tasks(model)},
        "route": current_route(model),
        "merged": merged(model),
        "output": model(IDS).detach(),
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    return before == after


def refuses(model: nn.Module, act: Callable[[], Any], kind: type[AdapterError], said: str) -> None:
    before, start = everything(model), time.process_time()
    with pytest.raises(kind, match=said):
        act()
    assert time.process_time() - start < 2
    assert same(before, everything(model))


# -- what is asked of the model ------------------------------------------------------------------------------

SLOW = r"re:([\w.]|[\w.])*\W\W"
REQUESTS: list[tuple[Callable[[nn.Module], Any], type[AdapterError], str]] = [
    (lambda m: inject(m, name="a"), TaskError, "there is a task 'a' already; remove it first"),
    (lambda m: inject(m, name=""), TaskError, "a non-empty string, got ''"),
    (lambda m: inject(m, name=3), TaskError, "a non-empty string, got 3"),  # type: ignore[arg-type]
    (lambda m: remove(m, "b"), TaskError, r"no task 'b'; the model has \['tied', 'a'\]"),
    (lambda m: rename(m, "a", "tied"), TaskError, "'tied'"),
    (lambda m: rename(m, "b", "c"), TaskError, "no task 'b'"),
    (lambda m: inject(m, AdapterConfig(r=0), "b"), ConfigError, "r must be a whole number >= 1, got 0"),
    (
        lambda m: inject(m, AdapterConfig(r=7), "b"),
        ConfigError,
        "no update of it has a rank above 6, and r is 7",
    ),
    (lambda m: inject(m, AdapterConfig(r=10**8), "b"), ConfigError, "and r is 100000000; lower it"),
    (lambda m: inject(m, AdapterConfig(r=2, rank_pattern={"fc": 10**8}), "b"), ConfigError, "layer 'fc'"),
    (
        lambda m: inject(m, AdapterConfig(alpha=float("nan")), "b"),
        ConfigError,
        "alpha must be a finite number",
    ),
    (
        lambda m: inject(m, AdapterConfig(alpha=float("inf")), "b"),
        ConfigError,
        "alpha must be a finite number",
    ),
    (lambda m: inject(m, AdapterConfig(alpha_pattern={"fc": 0}), "b"), ConfigError, "other than 0, got 0"),
    (
        lambda m: inject(m, AdapterConfig(dropout=1.0), "b"),
        ConfigError,
        r"dropout must lie in \[0, 1\), got 1.0",
    ),
    (lambda m: inject(m, AdapterConfig(targets=("bakc",)), "b"), TargetError, "did you mean 'back'"),
    (
        lambda m: inject(m, AdapterConfig(targets=(SLOW,)), "b"),
        TargetError,
        "nothing|matched 0|takes over 1 s",
    ),
    (lambda m: m(IDS, task="b"), TaskError, r"no task 'b'; the model has"),
    (lambda m: m(IDS, task=["a", "b"]), TaskError, "no task 'b'"),
    (lambda m: m(IDS, tasks=["a", "b"]), TaskError, "no task 'b'"),
    (lambda m: m(IDS, tasks=["a", "a"]), RouteError, "names a task twice"),
    (lambda m: m(IDS, tasks={"a": float("nan")}), RouteError, "must be a finite number, got nan"),
    (lambda m: m(IDS, task="a", tasks=["a"]), RouteError, "not both"),
    (lambda m: m(IDS, task=["a", "a", "a"]), RouteError, "3 rows"),
    (lambda m: m(IDS, task=[]), RouteError, r"got \[\]"),
    (lambda m: set_route(m, "b"), TaskError, "no task 'b'"),
    (lambda m: route(m, "b").__enter__(), TaskError, "no task 'b'"),
    (lambda m: merge(m, "b"), TaskError, "no task 'b'"),
    (lambda m: merge(m, "tied"), MergeError, "shares its storage with embed.weight.*untie=True"),
    (lambda m: combine(m, {"a": 1.0, "b": 1.0}, name="c"), TaskError, "'b'"),
    (lambda m: combine(m, {"a": 1.0}, name="tied"), TaskError, "'tied'"),
    (lambda m: combine(m, {"a": float("inf")}, name="c"), AdapterError, "inf"),
    (lambda m: save(m, "/dev/null/x", "b"), TaskError, "no task 'b'"),
]


@pytest.mark.parametrize(("act", "kind", "said"), REQUESTS, ids=range(len(REQUESTS)))
def test_requests(act: Callable[[nn.Module], Any], kind: type[AdapterError], said: str, model: Tied) -> None:
    refuses(model, lambda: act(model), kind, said)


@pytest.mark.parametrize("name", ["a.b", "train", "copy", "keys", "forward", "weight", "1", "…", "%2E"])
def test_names_that_work(name: str, model: Tied, tmp_path: Path) -> None:
    inject(model, AdapterConfig(r=2, targets=("fc",)), name)
    assert tasks(model)[-1] == name
    save(model, tmp_path / "x", name)
    with torch.no_grad():
        assert torch.equal(model(IDS, task=name), model(IDS, task=None))
    remove(model, name)
    load(model, tmp_path / "x", name)
    assert current_route(model) == name


def test_a_merged_model_is_not_trained_routed_or_added_to(model: Tied) -> None:
    merge(model, "a")
    for act, kind, said in [
        (
            lambda: inject(model, AdapterConfig(r=2), "b"),
            RouteError,
            "'a' is merged.*unmerge before adding 'b'",
        ),
        (lambda: model(IDS, task="a"), RouteError, "'a' is merged"),
        (lambda: model(IDS, task=["a", None]), RouteError, "'a' is merged"),
        (lambda: set_route(model, None), RouteError, "'a' is merged"),
        (lambda: remove(model, "a"), RouteError, "one is merged"),
        (lambda: merge(model, "a"), MergeError, "'a' is merged already; unmerge it first"),
    ]:
        refuses(model, act, kind, said)
    model.train()
    with pytest.raises(
        RouteError, match=r"training would apply it twice; unmerge first, or call model.eval\(\)"
    ):
        model(IDS)


# -- what a file asks ----------------------------------------------------------------------------------------

FC = "base_model.model.fc"
Change = Callable[[dict[str, Tensor]], Any]
TENSORS: list[tuple[Change, str]] = [
    (
        lambda t: [t.update({k.replace("model.model.", "model.model.x."): t.pop(k)}) for k in list(t)],
        "belongs to no adaptable",
    ),
    (lambda t: t.pop(f"{FC}.lora_B.weight"), f"{FC}.lora_B.weight is missing"),
    (lambda t: t.update({f"{FC}.lora_C.weight": torch.ones(2)}), f"{FC}.lora_C.weight is unexpected"),
    (lambda t: t.update({f"{FC}.weight": torch.ones(8, 6)}), f"{FC}.weight is unexpected"),
    (lambda t: t.update({"fc.weight": torch.ones(8, 6)}), "fc.weight is unexpected"),
    (lambda t: t.update({f"{FC}.base_layer.weight": torch.ones(8, 6)}), "base_layer.weight is unexpected"),
    (
        lambda t: t[f"{FC}.lora_A.weight"].fill_(float("nan")),
        f"{FC}.lora_A.weight holds values that are not finite",
    ),
    (
        lambda t: t[f"{FC}.lora_A.weight"][0].fill_(float("inf")),
        "lora_A.weight holds values that are not finite",
    ),
    (lambda t: t.update({f"{FC}.lora_A.weight": torch.ones(2, 7)}), r"has shape \(2, 7\)"),
    (lambda t: t.update({f"{FC}.lora_A.weight": torch.ones(2, 6, dtype=torch.int64)}), "not finite numbers"),
]
CONFIGS: list[tuple[dict[str, Any] | str, type[AdapterError], str]] = [
    ({"r": 0}, ConfigError, "r must be a whole number >= 1, got 0"),
    ({"r": 7}, ConfigError, "a rank above 6, and r is 7"),
    ({"r": 10**8}, ConfigError, "a rank above 6, and r is 100000000"),
    ({"lora_alpha": float("nan")}, ConfigError, "alpha must be a finite number"),
    ({"lora_alpha": float("-inf")}, ConfigError, "alpha must be a finite number"),
    ({"target_modules": r"([\w.]|[\w.]|[\w.])*(fc|back)\W"}, AdapterError, "takes over 1 s|is unexpected"),
    ({"rank_pattern": {"fc": -1}}, ConfigError, r"rank_pattern\['fc'\] must be a whole number"),
    (
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        AdapterFileError,
        "names a class",
    ),
    ({"peft_type": "__import__('os')"}, ConfigError, "peft_type is"),
    ({"use_dora": "yes"}, ConfigError, "dora must be True or False, got 'yes'"),
    ("{", AdapterFileError, "is not JSON"),
    ('{"r": 2', AdapterFileError, "is not JSON"),
    ("[" * 10**6, AdapterFileError, "nested too deeply|not JSON"),
    ('{"a":' * 10**6 + "1" + "}" * 10**6, AdapterFileError, "nested too deeply|not JSON"),
    ("", AdapterFileError, "is not JSON"),
]


@pytest.mark.parametrize(("change", "said"), TENSORS, ids=range(len(TENSORS)))
def test_tensors_of_a_file(change: Change, said: str, model: Tied, tmp_path: Path) -> None:
    save(model, tmp_path, "a")
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    refuses(model, lambda: load(model, tmp_path, "new"), AdapterFileError, said)
    refuses(model, lambda: load(model, tmp_path, "a"), AdapterFileError, said)


@pytest.mark.parametrize(("fields", "kind", "said"), CONFIGS, ids=range(len(CONFIGS)))
def test_configs_of_a_file(
    fields: dict[str, Any] | str, kind: type[AdapterError], said: str, model: Tied, tmp_path: Path
) -> None:
    save(model, tmp_path, "a")
    config = json.loads((tmp_path / CONFIG).read_text())
    text = fields if isinstance(fields, str) else json.dumps({**config, **fields})
    (tmp_path / CONFIG).write_text(text)
    refuses(model, lambda: load(model, tmp_path, "new"), kind, said)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_weights(keep: int, model: Tied, tmp_path: Path) -> None:
    save(model, tmp_path, "a")
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:keep])
    refuses(model, lambda: load(model, tmp_path, "new"), AdapterFileError, "cannot be read")
