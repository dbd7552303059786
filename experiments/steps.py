"""Training steps outside of a training, to be timed: those of a config, on its longest batch.

Notable: the step is the trainer's own, compiled and with its state donated, so that what is timed is what runs; input,
logging and checkpoints are left out.
"""

from collections.abc import Mapping
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


class TrainingStep:
    """A training step of a config, compiled; calling it runs one more, waits, and returns the metrics, arrays.

    Attributes:
      mebibytes: what it needs beside its state, its batch and what it returns: activations, by the compiler's plan.
    """

    def __init__(self, config: Mapping[str, Any], unused: Path, batch: Mapping[str, np.ndarray] | None = None) -> None:
        """Compiles.

        Args:
          unused: a folder that need not exist: nothing is written.
          batch: the arrays of every step; the config's longest batch if None.
        """
        experiment = build.build(config, unused)
        step = make_train_step(experiment.task, experiment.optimizer, accumulation=experiment.training.accumulation)
        self._constants, self._batch = experiment.task.constants, batch or longest_batch(experiment)
        self._state = jax.jit(experiment.create_state)()
        self._step = jax.jit(step, donate_argnums=0).lower(self._state, self._constants, self._batch).compile()
        self.mebibytes = self._step.memory_analysis().temp_size_in_bytes / 2**20

    def __call__(self, batch: Mapping[str, jax.Array] | None = None) -> dict[str, jax.Array]:
        """Runs it, on another batch of the same shapes if one is given."""
        self._state, metrics = self._step(self._state, self._constants, self._batch if batch is None else batch)
        return jax.block_until_ready(metrics)


def _size(batch: Mapping[str, np.ndarray]) -> int:
    return sum(value.size for value in batch.values())
