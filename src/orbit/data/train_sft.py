"""Document 000's training step for language models: `train_sft(engine)`.

    for _ in engine.train(loader, num_epochs=3):
        train_sft(engine)

The loss is the mean over supervised tokens and carries their number as its weight, so that under gradient
accumulation a window weighs every token the same, whichever micro-batch it fell into. A micro-batch whose
labels are all masked has weight 0 and adds nothing. Inside `engine.eval(loader)` the same call only measures.
The engine's autocast is already on in the loop's body. The engine is given a function, so that it can compute the loss
again (SAM) or in parts (`split_on_oom`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orbit.objective.causal_lm import CausalLM

if TYPE_CHECKING:
    from orbit.engine import Engine


def train_sft(engine: Engine, objective: CausalLM = CausalLM()) -> None:  # noqa: B008 (frozen, stateless)
    """Forward, loss and update for the batch in `engine.data`.

    Args:
        engine: inside the body of its `train` or `eval` loop, on dict batches with "labels".
        objective: the loss; give your own to ignore another index.
    """
    engine.update(lambda: objective(engine.model, engine.data))
