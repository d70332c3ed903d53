"""A Transformer as a folder: the same model comes back, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from orbit import adapter
from orbit.model import Transformer, TransformerConfig, auto_initialize
from orbit.model.errors import SettingError, WeightsError
from tests.tiny_llm import tiny_llama, tiny_tokenizer

IDS = torch.arange(6)[None]
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.5}


def model(dtype: torch.dtype = torch.float32, **settings: object) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SIZES, **settings), dtype=dtype).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_heads": 1, "eos_token_id": (1, 2), "window": 4, "max_length": 9},
        {"num_experts": 4, "tie_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=["plain", "experts"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_model_comes_back(settings: dict[str, object], dtype: torch.dtype, tmp_path: Path) -> None:
    saved = model(dtype, **settings)
    assert saved.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = Transformer.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == saved.config
    assert not loaded.training
    assert torch.equal(loaded(IDS).logits, saved(IDS).logits)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    wide = Transformer.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float64)
    assert wide(IDS).logits.dtype == torch.float64
    assert set(auto_initialize_reasons(loaded)) == {"loaded"}


def auto_initialize_reasons(net: nn.Module) -> list[str]:
    with pytest.warns(UserWarning, match="did nothing"):
        return list(auto_initialize(net).untouched.values())


def test_adapters_have_files_of_their_own(tmp_path: Path) -> None:
    saved = model()
    adapter.inject(saved, adapter.AdapterConfig(r=2, targets=("q_proj",)), "task")
    with torch.no_grad():
        saved.model.layers[0].self_attn.q_proj.lora_B.get("task").weight.fill_(0.5)
    saved.save_pretrained(tmp_path)
    adapter.save(saved, tmp_path / "task", "task")
    loaded = Transformer.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, saved(IDS, task=None).logits)
    adapter.load(loaded, tmp_path / "task", name="task")
    assert torch.equal(loaded(IDS, task="task").logits, saved(IDS, task="task").logits)


def test_a_llama_is_read_too(tmp_path: Path) -> None:
    llama = tiny_llama(tiny_tokenizer())
    llama.save_pretrained(tmp_path)
    torch.testing.assert_close(
        Transformer.from_pretrained(tmp_path)(IDS).logits, llama(IDS).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["settings"].update(num_layres=3), "no setting 'num_layres'; did you mean 'num_layers'"),
        (lambda c: c["settings"].pop("num_heads"), "needs num_heads"),
        (lambda c: c.pop("settings"), "has no settings"),
        (lambda c: c["settings"].update(norm_eps="small"), "the config of a Transformer"),
        (lambda c: c.update(dtype="float99"), "dtype 'float99'"),
        (lambda c: c.update(model_type="bert"), "model_type 'bert' is no Llama"),
    ],
)
def test_a_config_that_does_not_fit(change: object, says: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)  # type: ignore[operator]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match=says):
        Transformer.from_pretrained(tmp_path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    saved = model()
    saved.save_pretrained(tmp_path / "a")
    model(num_kv_heads=1).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(WeightsError, match="k_proj.weight has the shape"):
        Transformer.from_pretrained(tmp_path / "a")
    with pytest.raises(WeightsError, match="meta device"):
        Transformer(saved.config, device="meta").save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()
