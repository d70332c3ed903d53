"""X-LoRA: a mixture of LoRA experts with a learned gate per token and layer (document 001)."""

from orbit.xlora.classifier import Classifier
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.create import add_xlora_to_model
from orbit.xlora.errors import CacheError, XLoRAError
from orbit.xlora.model import mix, remove, xLoRAModel, xLoraModel

__all__ = [
    "CacheError",
    "Classifier",
    "XLoRAError",
    "add_xlora_to_model",
    "mix",
    "remove",
    "xLoRAConfig",
    "xLoRAModel",
    "xLoraModel",
]
