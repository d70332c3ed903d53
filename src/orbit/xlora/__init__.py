"""X-LoRA: a mixture of LoRA experts with a learned gate per token and layer (document 001)."""

from orbit.xlora import xlora_utils
from orbit.xlora.approximate import approximate
from orbit.xlora.classifier import Classifier
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.create import add_xlora_to_model, from_pretrained
from orbit.xlora.errors import CacheError, XLoRAError
from orbit.xlora.log import load_scalings_log
from orbit.xlora.model import mix, remove, xLoRAModel, xLoraModel
from orbit.xlora.reuse import Approximation

__all__ = [
    "Approximation",
    "CacheError",
    "Classifier",
    "XLoRAError",
    "add_xlora_to_model",
    "approximate",
    "from_pretrained",
    "load_scalings_log",
    "mix",
    "remove",
    "xLoRAConfig",
    "xLoRAModel",
    "xLoraModel",
    "xlora_utils",
]
