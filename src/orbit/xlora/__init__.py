"""X-LoRA: a mixture of LoRA experts with a learned gate per token and layer (document 001)."""

from orbit.xlora import xlora_utils
from orbit.xlora.approximate import approximate
from orbit.xlora.classifier import Classifier
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.create import add_xlora_to_model, from_pretrained
from orbit.xlora.errors import CacheError, XLoRAError
from orbit.xlora.loads import ExpertLoad, expert_load
from orbit.xlora.log import load_scalings_log
from orbit.xlora.model import mix, remove, xLoRAModel, xLoraModel
from orbit.xlora.remember import remember
from orbit.xlora.reuse import Approximation
from orbit.xlora.scalings import Scalings, entropy

__all__ = [
    "Approximation",
    "CacheError",
    "Classifier",
    "ExpertLoad",
    "Scalings",
    "XLoRAError",
    "add_xlora_to_model",
    "approximate",
    "entropy",
    "expert_load",
    "from_pretrained",
    "load_scalings_log",
    "mix",
    "remember",
    "remove",
    "xLoRAConfig",
    "xLoRAModel",
    "xLoraModel",
    "xlora_utils",
]
