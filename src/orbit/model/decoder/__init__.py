"""A small decoder of our blocks: its settings, weights from a Llama, and text from it."""

from orbit.model.decoder.config import TransformerConfig
from orbit.model.decoder.generate import generate
from orbit.model.decoder.llama import load_llama_weights
from orbit.model.decoder.transformer import Transformer, TransformerOutput

__all__ = ["Transformer", "TransformerConfig", "TransformerOutput", "generate", "load_llama_weights"]
