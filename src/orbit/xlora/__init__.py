"""X-LoRA: a mixture of LoRA experts with a learned gate per token and layer (document 001)."""

from orbit.xlora.classifier import Classifier
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.create import add_xlora_to_model
from orbit.xlora.errors import CacheError, XLoRAError
from orbit.xlora.loads import ExpertLoad, expert_load
from orbit.xlora.model import mix, remove, xLoRAModel, xLoraModel
from orbit.xlora.scalings import Scalings, entropy

__all__ = [
    "CacheError",
    "Classifier",
    "ExpertLoad",
    "Scalings",
    "XLoRAError",
    "add_xlora_to_model",
    "entropy",
    "expert_load",
    "mix",
    "remove",
    "xLoRAConfig",
    "xLoRAModel",
    "xLoraModel",
]
