"""X-LoRA: a mixture of LoRA experts with a learned gate per token and layer (document 001)."""

from orbit.xlora import xlora_utils
from orbit.xlora.classifier import Classifier
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.create import add_xlora_to_model, from_pretrained
from orbit.xlora.errors import CacheError, XLoRAError
from orbit.xlora.generation.approximating import approximate
from orbit.xlora.generation.approximation import Approximation
from orbit.xlora.log import load_scalings_log
from orbit.xlora.mixing import mix, remove
from orbit.xlora.model import xLoRAModel, xLoraModel
from orbit.xlora.passes.memory import remember
from orbit.xlora.seeing.loads import ExpertLoad, expert_load
from orbit.xlora.seeing.scalings import Scalings, entropy

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
