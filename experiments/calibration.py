"""A little data that a trained model reads, so that scores know what its weights do: flags, and what is seen."""

from collections.abc import Collection, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from fastlm.compress import evidence, importance
from fastlm.compress.evidence import Evidence
from fastlm.errors import UserError
from fastlm.training import quality
from fastlm.training.restore import Restored

FLAGS = flags.FLAGS
ROWS = 8  # of a batch


def define_model() -> None:
    """Defines what is changed, or read: --workdir, --step."""
    flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
    flags.DEFINE_string("step", "", "checkpoint of it: a number, 'best', or nothing for the newest")


def define_flags() -> None:
    """Defines what is read: --source, --split, --batches."""
    flags.DEFINE_multi_string("source", [], "what the scores look at; default the training's")
    flags.DEFINE_string("split", "train", "of it")
    flags.DEFINE_integer("batches", 16, f"of {ROWS} rows, that the scores look at", lower_bound=1)


def asked() -> quality.Asked:
    """Returns what the flags ask for."""
    return quality.Asked(tuple(FLAGS.source), FLAGS.split, batch_size=ROWS, batches=FLAGS.batches)


def shares(texts: Sequence[str], flag: str) -> list[float]:
    """Reads shares of something.

    Raises:
      UserError: one is no number from 0 to 1.
    """
    found = []
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise UserError(f"{flag}: '{text}' is no share from 0 to 1")
        found.append(value)
    return found


def seen(restored: Restored, mesh: Mesh, matrices: Collection[str], scores: Iterable[str]) -> dict[str, Evidence]:
    """Returns what all these scores look at; nothing is read where they look at weights alone.

    Raises:
      UserError: there is no such data, or nothing in it that the loss counts.
    """
    needs = {need for name in scores for need in importance.WEIGHTS[name].needs}
    return evidence_for(restored, mesh, matrices, needs)


def evidence_for(
    restored: Restored, mesh: Mesh, matrices: Collection[str], wanted: Collection[str]
) -> dict[str, Evidence]:
    """Returns these attributes of `Evidence`, gathered on what the flags name; see `seen`."""
    if not wanted:
        return {path: Evidence() for path in matrices}
    task, batches = restored.trained(restored.kind(), mesh).task, quality.batches(restored, mesh, asked())
    return evidence.gather(task, {"model": restored.params}, batches, matrices, wanted)


def influences(restored: Restored, mesh: Mesh) -> np.ndarray:
    """Returns the influence of each layer of the only stack (`importance.influence`), the mean over batches.

    Raises:
      UserError: a model with two stacks, a task that shows nothing of what is inside, or no data.
    """
    task = restored.trained(restored.kind(), mesh).task
    if restored.model.cfg.encoder_layers or task.predictions is None:
        raise UserError("--layers influence: needs a model with one stack and a task that predicts; name the layers")

    @jax.jit
    def one(params, batch):
        batch = task.prepare({"model": params}, task.constants, batch, jnp.zeros((), jnp.int32), None)
        carry = task.carry(len(next(iter(batch.values()))))
        read = task.predictions.read({"model": params}, task.constants, carry, batch, None, ("hidden",))
        return importance.influence(read.captured["hidden"], read.documents[""] != 0)

    found = [one(restored.params, batch) for batch in quality.batches(restored, mesh, asked())]
    if not found:
        raise UserError("--source: no rows there")
    return np.mean(found, axis=0)
