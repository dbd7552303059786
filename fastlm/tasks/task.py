"""The contract between what is learned and the one train step.

Notable: a `Task` is a record of pure functions, and everything that compresses while training is a
function `Task -> Task`. The step calls these functions and knows none of their names. `loss`
returns a sum and the count it is over; the step divides by the summed count, so that accumulating
microbatches equals the large batch for masked means too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from fastlm.models import ModelConfig, abstract

Tree = Any
Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Compression:
    """How trained parameters become the weights that the forward pass sees, shaped like an optax transform.

    Attributes:
      init: `(params) -> state`.
      view: `(params, constants, state, step, rng | None) -> weights`; without a key, deterministic.
      penalty: `(params, state, step) -> (scalar, metrics)`, added to the mean loss.
      update: `(params, state, grads, aux, step, rng) -> (params, state)`, after the optimizer.
    """

    init: Callable[[Tree], Tree] = lambda params: ()
    view: Callable[..., Tree] = lambda params, constants, state, step, rng: params
    penalty: Callable[..., tuple[Array, dict[str, Array]]] = lambda params, state, step: (jnp.zeros(()), {})
    update: Callable[..., tuple[Tree, Tree]] = lambda params, state, grads, aux, step, rng: (params, state)


@dataclasses.dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
      init: `(rng, model_params) -> params`, with the model's own under "model".
      prepare: `(weights, constants, batch, step, rng | None) -> batch`, never differentiated; without a key
        (evaluation), deterministic.
      loss: `(weights, constants, carry, batch, step, rng | None) -> (total, count, (carry, aux))`: the summed
        loss, the number of things it sums over, the carry for the next batch (leading axis: batch rows),
        and `aux["sums"]`, a dict of sums (numbers or small arrays) from which `summarize` makes metrics. All
        of `aux` is summed over microbatches, so whatever is in it must be a sum.
      summarize: `(sums as float64) -> metrics`, plain Python on totals over any number of batches.
      predict: `(weights, constants, carry, batch) -> (carry, outputs)` for use after training.
      carry: `(rows) -> carry` at the start of an epoch.
      compression: see `Compression`.
      constants: arrays that the functions need but that are not trained.
      export: `(params, constants, compression state) -> parameters of the model alone`, plain and final; None
        for `params["model"]`.
      frozen: path patterns of trainables that the optimizer leaves alone.
      axes: logical axes of the trainables by path, "model/layers/0/attention/q".
    """

    init: Callable[[Array, Tree], Tree]
    loss: Callable[..., tuple[Array, Array, tuple[Tree, dict[str, Any]]]]
    summarize: Callable[[dict[str, float]], dict[str, float]]
    predict: Callable[..., Any]
    prepare: Callable[..., Batch] = lambda weights, constants, batch, step, rng: batch
    carry: Callable[[int], Tree] = lambda rows: ()
    compression: Compression = Compression()
    export: Callable[[Tree, Tree, Tree], Tree] | None = None
    frozen: tuple[str, ...] = ()
    constants: Tree = dataclasses.field(default_factory=dict)
    axes: dict[str, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)


def of_model(cfg: ModelConfig, **parts: Any) -> Task:
    """Returns the task of `parts` (fields of `Task`) that trains a model of `cfg` and nothing beside it."""
    axes = {f"model/{path}": names for path, names in abstract(cfg)[1].items()}
    return Task(init=lambda rng, model_params: {"model": model_params}, axes=axes, **parts)
