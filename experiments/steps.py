"""Training steps outside of a training, to be timed: those of a config, on its longest batch.

Notable: the step is the trainer's own, compiled and with its state donated, so that what is timed is what runs; input,
logging and checkpoints are left out.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastlm.training import build
from fastlm.training.step import make_train_step

LOOK_AT = 50  # batches, of which the longest counts: where rows have many lengths, not every batch has the longest


def longest_batch(experiment: build.Experiment) -> dict[str, np.ndarray]:
    """Returns the largest of the first training batches, without what only tells where it came from."""
    reader = experiment.train_batches()
    try:
        batch = max((next(reader) for _ in range(LOOK_AT)), key=_size)
    finally:
        reader.close()
    return {name: value for name, value in batch.items() if name not in ("record", "epoch")}


def training_step(
    config: Mapping[str, Any], unused: Path, batch: Mapping[str, np.ndarray] | None = None
) -> Callable[[], dict[str, jax.Array]]:
    """Returns what runs one more training step and waits for it; it returns the metrics, arrays.

    Args:
      unused: a folder that need not exist: nothing is written.
      batch: the arrays of every step; the config's longest batch if None.
    """
    experiment = build.build(config, unused)
    batch = batch or longest_batch(experiment)
    step = make_train_step(experiment.task, experiment.optimizer, accumulation=experiment.training.accumulation)
    step, state = jax.jit(step, donate_argnums=0), [jax.jit(experiment.create_state)()]

    def turn() -> dict[str, jax.Array]:
        state[0], metrics = step(state[0], experiment.task.constants, batch)
        return jax.block_until_ready(metrics)

    return turn


def _size(batch: Mapping[str, np.ndarray]) -> int:
    return sum(value.size for value in batch.values())
