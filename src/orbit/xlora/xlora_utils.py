"""Document 001's convenience function: base model, mixture and tokenizer in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from orbit.xlora.create import from_pretrained
from orbit.xlora.log import load_scalings_log

__all__ = ["load_model", "load_scalings_log"]


def load_model(
    model_name: str | os.PathLike[str],
    fine_tune_model_name: str | os.PathLike[str] | None,
    device: str | torch.device,
    dtype: torch.dtype,
    adapters: Mapping[str, str | os.PathLike[str]] | Sequence[str] | None = None,
    use_flash_attention_2: bool = False,
    load_xlora: bool = True,
    verbose: bool = False,
    use_cache: bool = False,
) -> tuple[Any, Any]:
    """A causal language model with its tokenizer, made the mixture that was saved in a folder.

    Args:
        model_name: the base model, a folder or a name on the Hub; its tokenizer is loaded from there too.
        fine_tune_model_name: the folder of the mixture; may be None without `load_xlora`.
        device: of all of it.
        dtype: of the base model.
        adapters: as `from_pretrained` takes them.
        use_flash_attention_2: use FlashAttention 2, else what transformers chooses.
        load_xlora: make it a mixture; False leaves the base model. (The document's API list has False here, and its
            example leaves the argument out and loads a mixture.)
        verbose: print what was loaded.
        use_cache: does a forward return a key-value cache unasked? `generate` keeps one in any case.

    Returns:
        (model, tokenizer), the model in eval mode. A tokenizer without padding pads with its end-of-text token.

    Raises:
        XLoRAError, AdapterFileError: as `from_pretrained`. ImportError: without transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = {"attn_implementation": "flash_attention_2"} if use_flash_attention_2 else {}
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, **chosen).to(device)
    model.config.use_cache = use_cache
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if load_xlora:
        if fine_tune_model_name is None:
            raise ValueError(
                "load_model(load_xlora=True) needs fine_tune_model_name, the folder of the mixture"
            )
        model = from_pretrained(fine_tune_model_name, model, adapters, verbose, device)
    elif verbose:
        print(f"{type(model).__name__}: the base model alone, as load_xlora=False")
    return model, tokenizer
