"""Everything a training run is, as one value.

Notable: `params` holds trainable floating-point arrays only; what is constant is passed beside the
state. Placement is structural: optimizer moments and averages lie where their parameter lies.
The random key is kept as its raw words so that a checkpoint is plain arrays.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from fastlm.models import Model
from fastlm.ops import paths
from fastlm.parallel import rules
from fastlm.tasks.task import Task
from fastlm.training import precision
from fastlm.training.precision import LossScale


@flax.struct.dataclass
class Skipped:
    """Steps whose gradients were not finite: all of them, and how many in a row just now."""

    total: Array
    run: Array


@flax.struct.dataclass
class State:
    """A training run between two steps.

    Attributes:
      step: batches consumed, skipped ones included.
      params, optimizer, compression: what is trained, and the state of what trains and compresses it.
      carry: what the task hands from one batch to the next, leading axis the rows of the batch.
      average: exponential moving average of `params`, or () when off.
      loss_scale: see `training.precision`.
      rng: raw key data; every step folds its number into it.
      skipped: see `Skipped`.
    """

    step: Array
    params: Any
    optimizer: Any
    compression: Any
    carry: Any
    average: Any
    loss_scale: LossScale
    rng: Array
    skipped: Skipped


def create(
    task: Task,
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    rows: int,
    average: bool,
    loss_scale: LossScale,
    model_params: Any = None,
) -> State:
    """Returns the state before the first step; pure, so usable under `jit` and `eval_shape`.

    Args:
      rows: rows of a global batch, for the carry.
      model_params: start from these instead of fresh ones; copied, never aliased.
    """
    init_key, task_key, run_key = jax.random.split(jax.random.key(seed), 3)
    model_params = model.init(init_key) if model_params is None else jax.tree.map(jnp.copy, model_params)
    params = task.init(task_key, model_params)
    zero = lambda: jnp.zeros((), jnp.int32)
    return State(
        step=zero(),
        params=params,
        optimizer=optimizer.init(params),
        compression=task.compression.init(params),
        carry=task.carry(rows),
        average=jax.tree.map(jnp.copy, params) if average else (),
        loss_scale=loss_scale,
        rng=jax.random.key_data(run_key),
        skipped=Skipped(zero(), zero()),
    )


def of_model(model_params: Any) -> State:
    """Returns a state that holds a model and nothing of a training."""
    zero = jnp.zeros((), jnp.int32)
    key = jax.random.key_data(jax.random.key(0))
    return State(
        zero, {"model": model_params}, (), (), (), (), precision.loss_scale_for("float32"), key, Skipped(zero, zero)
    )


def shardings(abstract_state: State, task: Task, mesh: Mesh) -> State:
    """Returns the placement of every leaf of the state on `mesh`.

    Raises:
      KeyError: a trainable array that `task.axes` does not name; it would be replicated without a word.
    """
    for path, leaf in paths.flatten(abstract_state.params).items():
        if leaf.shape and path not in task.axes:
            raise KeyError(f"trainable {path} {leaf.shape} has no logical axes; the task must name them in `axes`")
    placed = rules.shardings(abstract_state, task.axes, mesh)

    def rows(leaf: Any) -> NamedSharding:
        names = ("batch",) + (None,) * (len(leaf.shape) - 1)
        return NamedSharding(mesh, rules.partition_spec(names, leaf.shape, mesh))

    return placed.replace(carry=jax.tree.map(rows, abstract_state.carry))
