"""The contract between what is learned and the one train step.

Notable: a `Task` is a record of pure functions, and everything that compresses while training is a
function `Task -> Task`. The step calls these functions and knows none of their names. `loss`
returns a sum and the count it is over; the step divides by the summed count, so that accumulating
microbatches equals the large batch for masked means too.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.models import Model, ModelConfig, abstract
from fastlm.ops.chunked_loss import MASK, Head, Objective, Scores, chunked_loss

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


class Read(NamedTuple):
    """What a model makes of a batch up to its head.

    Attributes:
      hidden: what the head reads of each of a row's P predictions.
      pieces: what the objective needs of each, arrays [B, P, ...]; "mask" [B, P] is 1 where it counts.
      carry: for the next batch.
      captured: what was asked for, by name, an entry per layer (see `Model.features`); an encoder-decoder's encoder
        has its own under "encoder_...".
      documents: of the tokens that a stack read, by stack ("" the only one or the decoder, "encoder"): the number of
        each token's document in its row, 0 for padding.
    """

    hidden: Float[Array, "B P D"]
    pieces: dict[str, Array]
    carry: Tree
    captured: dict[str, list]
    documents: dict[str, Int[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """How a loss is made of a model's outputs: the seam for whatever compares them with another model's.

    Attributes:
      read: `(weights, constants, carry, batch, rng | None, capture) -> Read`.
      head: `(what head_params returned, hidden [..., D]) -> logits [..., C]`, of a distribution over C.
      head_params: `(weights) -> what of them the head reads`.
      objective: the task's own loss of these logits.
      sums: `(its scores, pieces, constants) -> sums` for `Task.summarize`.
      chunk: predictions whose logits exist at a time.
    """

    read: Callable[..., Read]
    head: Head
    head_params: Callable[[Tree], Tree]
    objective: Objective
    sums: Callable[[Scores, Mapping[str, Array], Tree], dict[str, Array]]
    chunk: int = 1024

    def loss(
        self, weights: Tree, constants: Tree, carry: Tree, batch: Batch, step: Array, rng: Array | None
    ) -> tuple[Array, Array, tuple[Tree, dict[str, Any]]]:
        """The `Task.loss` of the objective alone."""
        del step
        read = self.read(weights, constants, carry, batch, rng, ())
        total, scores = self.scored(weights, read)
        return total, jnp.sum(read.pieces[MASK]), (read.carry, {"sums": self.sums(scores, read.pieces, constants)})

    def scored(self, weights: Tree, read: Read) -> tuple[Array, Scores]:
        """Returns (the summed objective, its scores of each prediction)."""
        params = self.head_params(weights)
        return chunked_loss(self.objective, self.head, params, read.hidden, (), read.pieces, chunk=self.chunk)


def through_head(
    model: Model, read: Callable[..., Read], objective: Objective, sums: Callable[..., Any]
) -> Predictions:
    """Returns predictions of a model's own head."""
    params = lambda weights: model.head_params(weights["model"])
    return Predictions(read, model.head, params, objective, sums, model.compute.loss_chunk)


def captured(aux: Mapping[str, Any], capture: Iterable[str], stack: str = "") -> dict[str, list]:
    """Returns what of a model's `aux` was captured, named as in `Read.captured`."""
    names = {f"{prefix}{name}" for name in capture for prefix in ("", "cross_")}
    return {f"{stack}_{name}" if stack else name: aux[name] for name in names if name in aux}


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
      predictions: what `loss` is made of, where that is a distribution for each of several places; else None.
      origins: what constants were made of that lies elsewhere: its name, and a fingerprint; kept in checkpoints.
      join: `(iterator over training batches) -> the same with what a wrapper adds to each on the host`.
      join_evaluation: the same for one pass of evaluation batches.
      remarks: `(metrics of an evaluation) -> lines` that a person should read.
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
    predictions: Predictions | None = None
    origins: dict[str, str] = dataclasses.field(default_factory=dict)
    join: Callable[[Any], Any] = lambda batches: batches
    join_evaluation: Callable[[Iterable[Any]], Iterable[Any]] = lambda batches: batches
    remarks: Callable[[dict[str, float]], tuple[str, ...]] = lambda metrics: ()
    constants: Tree = dataclasses.field(default_factory=dict)
    axes: dict[str, tuple[str | None, ...]] = dataclasses.field(default_factory=dict)


def of_model(cfg: ModelConfig, **parts: Any) -> Task:
    """Returns the task of `parts` (fields of `Task`) that trains a model of `cfg` and nothing beside it.

    Where the parts have `predictions`, the loss is theirs.
    """
    if "predictions" in parts:
        parts = {"loss": parts["predictions"].loss} | parts
    axes = {f"model/{path}": names for path, names in abstract(cfg)[1].items()}
    return Task(init=lambda rng, model_params: {"model": model_params}, axes=axes, **parts)
