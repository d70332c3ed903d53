"""What docs/formats.md says of PEFT and our files rely on: a new PEFT that changes it fails here first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tests.laws.peft_oracle import (
    KINDS,
    VARIANTS,
    Cell,
    Factors,
    Skip,
    bare_base,
    dense_output,
    peft_cell,
    peft_config,
    random_factors,
)

# peft asks transformers a question that transformers has renamed, and leaves a config file to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor.s. have invalid shape"),  # lora_bias
]

WRONG = {  # LoRA's verdicts; the rest of the table is right
    "Embedding with scale_grad_by_freq": "gradient off",
    "Conv1d with dilation and padding='same'": "output off",
    "Conv2d with circular padding": "output off",
    "MultiheadAttention": "output off",
}
KEYS: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {
    ("Conv1D", "DoRA"): {
        "lora_A.weight": (4, 7),
        "lora_B.weight": (6, 4),
        "lora_magnitude_vector": (6,),
    },
    ("Embedding", "DoRA"): {
        "lora_embedding_A": (4, 9),
        "lora_embedding_B": (6, 4),
        "lora_magnitude_vector": (6,),
    },
    ("Conv2d with stride and padding", "DoRA"): {
        "lora_A.weight": (4, 4, 3, 3),
        "lora_B.weight": (6, 4, 1, 1),
        "lora_magnitude_vector": (1, 6, 1, 1),
    },
    ("Conv2d with groups", "LoRA"): {"lora_A.weight": (4, 4, 3, 3), "lora_B.weight": (6, 2, 1, 1)},
    ("Linear", "LoRA with bias"): {
        "lora_A.weight": (4, 7),
        "lora_B.weight": (6, 4),
        "lora_B.bias": (6,),
    },
    ("MultiheadAttention", "LoRA"): {
        "lora_A.weight": (4, 8),
        "lora_B.weight": (24, 4),
        "base_layer.out_proj.lora_A.weight": (4, 8),
        "base_layer.out_proj.lora_B.weight": (8, 4),
    },
    ("Experts", "LoRA"): {  # up is registered first, so it lies innermost
        "base_layer.lora_A.weight": (12, 6),
        "base_layer.lora_B.weight": (5, 12),
        "lora_A.weight": (12, 5),
        "lora_B.weight": (6, 12),
    },
}


def saved(model: Any, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder, **options)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Conv2d with dilation"])
def test_peft_computes_the_dense_weight_or_is_known_not_to(kind: str) -> None:
    cell = peft_cell(kind, "LoRA")
    assert isinstance(cell, Cell)
    assert (cell.wrong or "").startswith(WRONG.get(kind, "")), cell.wrong
    assert bool(cell.wrong) == (kind in WRONG), cell.wrong


@pytest.mark.parametrize(
    "kind", ["Linear", "Conv1D", "Embedding", "Conv2d with stride and padding", "Conv3d"]
)
def test_the_axes_of_dora_are_pefts(kind: str) -> None:
    cell = peft_cell(kind, "DoRA")
    assert isinstance(cell, Cell)
    assert cell.wrong is None


@pytest.mark.parametrize(
    ("kind", "variant", "reason"),
    [
        ("Conv2d with dilation", "LoRA", "size of tensor"),
        ("MultiheadAttention", "DoRA", "does not support DoRA"),
        ("Experts", "DoRA", "use_dora=True"),
        ("Embedding", "LoRA with bias", "not supported for Embedding"),
        ("Conv1d", "pissa", "Unknown initialization"),
        ("Conv1D", "olora", "cannot be multiplied"),
        ("Linear", "gated", "no variant"),
    ],
)
def test_peft_refuses_a_cell_in_its_own_words(kind: str, variant: str, reason: str) -> None:
    cell = peft_cell(kind, variant)
    assert isinstance(cell, Skip)
    assert reason in cell.reason


@pytest.mark.parametrize(("kind", "variant"), KEYS)
def test_the_keys_and_shapes_of_a_file(kind: str, variant: str, tmp_path: Path) -> None:
    model = get_peft_model(KINDS[kind].make(torch.bfloat16), peft_config(kind, variant))
    tensors = saved(model, tmp_path)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        f"base_model.model.{KINDS[kind].target}.{end}": shape for end, shape in KEYS[kind, variant].items()
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_multihead_attention_counts_its_output_projection_twice() -> None:
    cell = peft_cell("MultiheadAttention", "LoRA")
    assert isinstance(cell, Cell)
    factors = dict(cell.factors)
    out = factors["layer.out_proj.weight"]
    factors["layer.out_proj.weight"] = Factors(out.A, 2 * out.B)
    twice = dense_output("MultiheadAttention", "LoRA", bare_base(cell.model, "MultiheadAttention"), factors)
    torch.testing.assert_close(cell.model(*KINDS["MultiheadAttention"].batch()), twice)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_plain_save_of_pissa_and_olora_means_the_original_base(init: str, tmp_path: Path) -> None:
    kind = KINDS["Linear"]
    model = get_peft_model(kind.make(), peft_config("Linear", init)).eval()
    saved(model, tmp_path / "initial")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    wanted = model(*kind.batch())
    saved(model, tmp_path / "plain")
    again = PeftModel.from_pretrained(kind.make(), tmp_path / "plain").eval()
    torch.testing.assert_close(again(*kind.batch()), wanted)

    converted = saved(
        model, tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    assert {tuple(value.shape) for value in converted.values()} == {(8, 7), (6, 8)}
    again = PeftModel.from_pretrained(kind.make(), tmp_path / "lora").eval()
    torch.testing.assert_close(again(*kind.batch()), wanted)


def test_token_rows_are_saved_as_they_are_in_the_order_of_the_indices(llama: Any, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    rows = model.get_input_embeddings().weight[[5, 3]].detach().clone()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 3]))
    tensors = {key: value for key, value in saved(model, tmp_path).items() if "lora_" not in key}
    (key,) = tensors  # none for the tied head
    assert key == "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(tensors[key], rows)


def test_modules_and_biases_are_saved_under_their_base_names(llama: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 5), "head": nn.Linear(5, 2)})
    config = LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"], bias="all")
    keys = {key.removeprefix("base_model.model.") for key in saved(get_peft_model(model, config), tmp_path)}
    assert {key for key in keys if "lora_" not in key} >= {
        "a.base_layer.bias",
        "b.bias",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_factors_have_pefts_shapes(variant: str) -> None:
    cell = peft_cell("Linear", variant)
    if isinstance(cell, Skip):
        pytest.skip(cell.reason)
    ours = random_factors("Linear", variant)["layer.weight"].tensors()
    theirs = cell.factors["layer.weight"].tensors()
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }
