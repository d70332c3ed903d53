"""Models by name."""

import pytest
import torch
from torch import nn

from orbit.builder import build_from_cfg
from orbit.model import SettingError, Transformer, build_model, list_models, register_model
from orbit.model import registry as under_test


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    registry = under_test.MODEL_REGISTRY
    monkeypatch.setattr(registry, "_things", dict(registry._things))


def test_what_is_registered_is_built_with_its_arguments():
    @register_model("tiny")
    class Tiny(nn.Linear): ...

    @register_model("made")
    def make(width, *, depth=1):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    assert Tiny.__name__ == "Tiny"
    assert isinstance(build_model("tiny", in_features=2, out_features=3), Tiny)
    assert len(build_model("made", width=4, depth=3)) == 3
    assert list_models() == sorted(list_models())
    assert {"tiny", "made", "transformer"} <= set(list_models())


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(
        SettingError, match=r"model 'transfomer' is not registered.*did you mean 'transformer'"
    ):
        build_model("transfomer")


def test_a_name_is_registered_once():
    register_model("tiny")(nn.Linear)
    register_model("tiny")(nn.Linear)  # the same again, as a module that is reloaded does
    with pytest.raises(
        SettingError, match=r"'tiny' is registered already, as torch\.nn\.modules\.linear\.Linear"
    ):
        register_model("tiny")(nn.Conv1d)
    assert isinstance(build_model("tiny", in_features=1, out_features=1), nn.Linear)
    with pytest.raises(SettingError, match="without a name"):
        register_model("")


def test_the_transformer_by_its_settings_also_from_a_config():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = build_model("transformer", **sizes, device="meta", dtype=torch.bfloat16)
    assert isinstance(model, Transformer)
    assert model.get_input_embeddings().weight.is_meta
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    built = build_from_cfg({"type": "orbit.model.build_model", "*": ["transformer"], **sizes})
    assert built.config == model.config
    with pytest.raises(TypeError, match="vocab"):
        build_model("transformer", vocab=20)
