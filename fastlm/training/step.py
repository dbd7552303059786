"""The one train step, and the one evaluation step.

Notable: about twenty lines that know nothing of models, tasks or compressions: they call the
functions of a `Task`. Microbatches are summed, then divided once by the summed count, so
accumulation equals the large batch. A step whose gradients are not finite changes nothing but
`step`, `loss_scale` and `skipped`; like everything here that is a select, not a branch, so the
device never waits for the host.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fastlm.tasks.task import Batch, Task
from fastlm.training.state import Skipped, State

Metrics = dict[str, Array]


def make_train_step(
    task: Task, optimizer: optax.GradientTransformation, *, accumulation: int = 1, average_decay: float = 0.0
) -> Callable[[State, Any, Batch], tuple[State, Metrics]]:
    """Returns `(state, constants, batch) -> (state, metrics)`, to be jitted with the state donated.

    Args:
      accumulation: microbatches per step; must divide the rows of the batch.
      average_decay: of the exponential moving average; 0 when the state has none.
    """
    compression = task.compression

    def train_step(state: State, constants: Any, batch: Batch) -> tuple[State, Metrics]:
        step = state.step
        view_key, prepare_key, loss_key, update_key = jax.random.split(jax.random.fold_in(state.rng, step), 4)
        weights = compression.view(state.params, constants, state.compression, step, view_key)
        batch = task.prepare(weights, constants, batch, step, prepare_key)

        def scaled_loss(params, carry, micro, key):
            weights = compression.view(params, constants, state.compression, step, view_key)
            total, count, (carry, aux) = task.loss(weights, constants, carry, micro, step, key)
            return state.loss_scale.scale(total), (count, carry, aux)

        grads, count, carry, aux = _accumulate(scaled_loss, state.params, state.carry, batch, loss_key, accumulation)
        grads = state.loss_scale.unscale(jax.tree.map(lambda g: g / count, grads))
        (penalty, penalty_metrics), penalty_grads = jax.value_and_grad(compression.penalty, has_aux=True)(
            state.params, state.compression, step
        )
        grads = jax.tree.map(jnp.add, grads, penalty_grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(penalty)

        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params, compression_state = compression.update(params, state.compression, grads, aux, step, update_key)
        new = (params, optimizer_state, compression_state, carry, _average(state.average, params, average_decay, step))
        old = (state.params, state.optimizer, state.compression, state.carry, state.average)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        bad = (~finite).astype(jnp.int32)
        skipped = Skipped(state.skipped.total + bad, (state.skipped.run + 1) * bad)
        metrics = {"grad_norm": norm, "skipped": skipped.total, "skipped_run": skipped.run, **penalty_metrics}
        metrics |= {f"sums/{name}": value for name, value in aux["sums"].items()} | state.loss_scale.metrics()
        loss_scale = state.loss_scale.adjust(finite)
        return State(step + 1, *new, loss_scale, state.rng, skipped), metrics

    return train_step


def make_eval_step(task: Task) -> Callable[..., tuple[Any, Metrics]]:
    """Returns `(params, compression_state, constants, carry, batch, step) -> (carry, sums)`, deterministic."""

    def eval_step(params, compression_state, constants, carry, batch, step):
        weights = task.compression.view(params, constants, compression_state, step, None)
        batch = task.prepare(weights, constants, batch, step, None)
        _, _, (carry, aux) = task.loss(weights, constants, carry, batch, step, None)
        return carry, aux["sums"]

    return eval_step


def _accumulate(loss: Callable, params: Any, carry: Any, batch: Batch, key: Array, pieces: int):
    """Sums gradients, counts and aux over microbatches; row r of the batch goes to piece r % pieces."""
    grad = jax.grad(loss, has_aux=True)
    if pieces == 1:
        grads, (count, carry, aux) = grad(params, carry, batch, key)
        return grads, count, carry, aux

    # Strided rows: each microbatch is spread over all devices, as the batch itself is.
    split = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]), 0, 1)
    join = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    def body(sums, piece):
        micro, carry, key = piece
        grads, (count, carry, aux) = grad(params, carry, micro, key)
        return jax.tree.map(jnp.add, sums, (grads, count, aux)), carry

    pieces_in = (jax.tree.map(split, batch), jax.tree.map(split, carry), jax.random.split(key, pieces))
    first = jax.tree.map(lambda x: x[0], pieces_in)
    shapes = jax.eval_shape(lambda p: (lambda g, r: (g, r[0], r[2]))(*grad(params, p[1], p[0], p[2])), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, count, aux), carry = jax.lax.scan(body, zeros, pieces_in)
    return grads, count, jax.tree.map(join, carry), aux


def _average(average: Any, params: Any, decay: float, step: Array) -> Any:
    if not decay:
        return average
    # Early on the average is short, or it would be made of initial weights for as long as it is wide.
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a * decay + p * (1 - decay), average, params)
