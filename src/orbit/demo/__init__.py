"""`orbit demo`: a real language model learns real facts."""

from orbit.demo.facts import Fact, FactsError, load_facts, load_prose
from orbit.demo.score import answers, exact_match, normalise, perplexity
from orbit.demo.smollm2 import ModelNotInstalledError, resolve_model, smollm2

__all__ = [
    "Fact",
    "FactsError",
    "ModelNotInstalledError",
    "answers",
    "exact_match",
    "load_facts",
    "load_prose",
    "normalise",
    "perplexity",
    "resolve_model",
    "smollm2",
]
