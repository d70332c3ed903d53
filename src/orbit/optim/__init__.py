"""Optimizers beside torch's own; each runs wherever one of torch.optim does.

Muon    orthogonalised updates for hidden matrices, AdamW for the rest
SAM     sharpness-aware minimisation around any optimizer
"""

from orbit.optim.hidden import Split, split
from orbit.optim.muon import Muon
from orbit.optim.sam import SAM

__all__ = ["SAM", "Muon", "Split", "split"]
