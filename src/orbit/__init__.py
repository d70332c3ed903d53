"""Orbit: one library to train, adapt, mix and unlearn PyTorch models.

orbit.engine     Engine: you own the loop                orbit.plugin     what listens to it
orbit.trainer    BaseTrainer: you subclass               orbit.core       the one loop under both
orbit.adapter    LoRA and DoRA, many tasks a layer       orbit.objective  losses, free of any trainer
orbit.xlora      a mixture of LoRA experts               orbit.multitask  many tasks on any module
orbit.data       SFT samples and batches                 orbit.chat       talk to the result
orbit.config     configs in Python, yaml and json        orbit.builder    objects from them
orbit.model      initialisation, building blocks         orbit.optim      Muon, SAM
orbit.utils, orbit.kit    documented import paths
"""

from orbit.core import Outcome, Plugin, seed_everything
from orbit.engine import Engine
from orbit.trainer import BaseTrainer

__all__ = ["BaseTrainer", "Engine", "Outcome", "Plugin", "seed_everything"]
