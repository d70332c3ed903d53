"""Objects from dicts: what is looked up, what is built inside, and where a dotted path may lead."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import pytest
import torch
from torch import nn

from orbit.builder import REGISTRY, BuildError, Registry, build_from_cfg


class Net:
    def __init__(self, *parts: Any, width: int = 1, head: Any = None, extra: Any = None) -> None:
        self.parts, self.width, self.head, self.extra = parts, width, head, extra


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.register()(Net)
    return made


def test_a_registered_name_and_a_dotted_path(registry: Registry):
    assert build_from_cfg({"type": "Net", "width": 3}, registry).width == 3
    layer = build_from_cfg({"type": "torch.nn.Linear", "*": [3, 2], "bias": False})
    assert type(layer) is nn.Linear
    assert layer.weight.shape == (2, 3)
    assert layer.bias is None
    assert build_from_cfg({"type": Net, "width": 2}, None).width == 2
    optimizer = build_from_cfg({"type": "torch.optim.AdamW", "lr": 0.5}, params=layer.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_recursive_builds_what_is_inside_and_leaves_the_extra_alone(registry: Registry):
    cfg = {
        "type": "Net",
        "*": [{"type": "Net", "width": 5}, ({"type": "torch.nn.ReLU"}, 1)],
        "head": {"a": [{"type": "torch.nn.Linear", "*": [1, 1]}], "plain": {"x": 1}},
    }
    before = copy.deepcopy(cfg)
    inner = {"type": "Net"}
    net = build_from_cfg(cfg, registry, recursive=True, extra=inner)
    assert net.parts[0].width == 5
    assert type(net.parts[1]) is tuple
    assert type(net.parts[1][0]) is nn.ReLU
    assert type(net.head["a"][0]) is nn.Linear
    assert net.head["plain"] == {"x": 1}
    assert net.extra is inner
    assert cfg == before
    flat = build_from_cfg(cfg, registry)
    assert flat.head == before["head"]
    assert flat.parts[0] == {"type": "Net", "width": 5}
    assert build_from_cfg({"type": "Net", "width": 1}, registry, width=2).width == 2


def test_partial(registry: Registry):
    made = build_from_cfg({"type": "partial:Net", "*": [1], "width": 3}, registry)
    assert isinstance(made, functools.partial)
    assert made(2).parts == (1, 2)
    assert made().width == 3
    loss = build_from_cfg({"type": "partial:torch.nn.functional.cross_entropy", "label_smoothing": 0.1})
    assert loss(torch.zeros(2, 3), torch.tensor([0, 1])).item() == pytest.approx(1.0986, abs=1e-4)


def test_registering(registry: Registry):
    @registry.register("short")
    def a_function_with_a_long_name() -> int:
        return 7

    assert build_from_cfg({"type": "short"}, registry) == 7
    assert registry.get("short") is a_function_with_a_long_name
    assert registry.get("nope") is None
    assert list(registry) == ["Net", "short"]
    assert "short" in registry
    assert "short" not in REGISTRY
    assert registry.register()(Net) is Net, "the same thing again"
    with pytest.raises(BuildError, match="'short' is registered already, as .*a_function_with_a_long_name"):
        registry.register("short")(Net)
    with pytest.raises(BuildError, match="dots and colons"):
        registry.register("a.b")(Net)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ([], "config is a list"),
        ({"width": 1}, r"config has no 'type'; it has \['width'\]"),
        ({"type": "Nett"}, "'Nett' is not registered.*did you mean 'Net'"),
        ({"type": 3}, "its type is 3"),
        ({"type": "Net", "*": 3}, r"config\['\*'\] holds positional arguments"),
        ({"type": "Net", 3: 4}, "the key 3, which is no name"),
        ({"type": "Net", "head": [{"type": "nope"}]}, r"config\.head\[0\]: type 'nope'"),
        ({"type": "Net", "*": [{"type": "nope"}]}, r"config\['\*'\]\[0\]: type 'nope'"),
    ],
)
def test_what_cannot_be_built_says_where(cfg: Any, message: str, registry: Registry):
    with pytest.raises(BuildError, match=message):
        build_from_cfg(cfg, registry, recursive=True)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes on exceptions came with Python 3.11")
def test_what_a_constructor_raises_says_where(registry: Registry):
    with pytest.raises(TypeError) as caught:
        build_from_cfg({"type": "Net", "head": {"type": "Net", "nope": 1}}, registry, recursive=True)
    assert caught.value.__notes__ == ["while building config.head, a 'Net'"]


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "torch.os.system",
        "torch.sys.exit",
        "torch.hub.load",
        "torch.load",
        "torch.jit.load",
        "torch.jit.CompilationUnit",
        "torch.package.PackageImporter",
        "torch.serialization.load",
        "torch.functional.torch.load",
        "torch.utils.cpp_extension.load",
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        "orbit.config.load_config",
        "torch.utils.collect_env.run",
        "torch.utils.data.dataloader.os.system",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.Module.__init__",
        "torch.nn",
        "torch.float32",
        "torch.nope",
        "torch.nn.nope.x",
        "tests.test_builder.Net",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path: str):
    with pytest.raises(BuildError, match=path.replace(".", r"\.")):
        Registry().resolve(path)


def test_a_package_is_allowed_by_registering_or_by_name(registry: Registry):
    assert registry.resolve("tests.test_builder.Net") is Net, "something of tests is registered"
    assert Registry(allow=("tests",)).resolve("tests.test_builder.Net") is Net
    other = Registry()
    with pytest.raises(BuildError, match=r"REGISTRY.allow\('tests'\)"):
        other.resolve("tests.test_builder.Net")
    other.allow("tests")
    assert other.resolve("tests.test_builder.Net") is Net
    with pytest.raises(BuildError, match="leads out of"):
        other.resolve("tests.test_builder.sys.exit")
