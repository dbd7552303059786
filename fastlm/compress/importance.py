"""How much weights and units of a model matter, and which units to keep.

Notable: two tables of small functions. `WEIGHTS` scores each weight of one matrix by its size and by what was seen of
it (`evidence`): a number that is the higher the more the loss would suffer. A unit's score is a number for each of
`models.units`, so that one that looks at activations or gradients needs no other code to cut by. `magnitude` looks at
weights alone: a cheap baseline that needs no data, and misses units that are large but say what others say.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fastlm.compress import surgeon
from fastlm.compress.evidence import ABSOLUTE, GRADIENT, INPUTS, OUTPUTS, PRODUCTS, SQUARE, Evidence
from fastlm.errors import UserError, nearest
from fastlm.models import ModelConfig, units
from fastlm.models import attention as attention_kinds
from fastlm.models.units import HIDDEN, Kept, Unit
from fastlm.ops import paths
from fastlm.ops.contract import dense
from fastlm.ops.leaf import is_whole

Scores = Mapping[Unit, Float[Array, "U"]]


# --- weights ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OfWeights:
    """A score of the weights of a matrix.

    Attributes:
      score: `(weights [I, O], what was seen of them, key) -> [I, O]`.
      needs: which attributes of `Evidence` it looks at.
      sums: whether, in training, it is summed over the steps, and not that of the last one.
    """

    score: Callable[[Array, Evidence, Array], Array]
    needs: tuple[str, ...] = ()
    sums: bool = False


def _alone(seen: Evidence) -> Float[Array, "I"]:
    """Returns the mean square of what each input has that the others do not tell."""
    return 1 / jnp.diagonal(jnp.linalg.inv(surgeon.damped(seen.products)))


WEIGHTS: dict[str, OfWeights] = {
    "magnitude": OfWeights(lambda w, seen, key: jnp.abs(w)),
    # SNIP (arXiv 1810.02340): how fast the loss changes as the weight is scaled.
    "gradient": OfWeights(lambda w, seen, key: jnp.abs(w * seen.gradient), (GRADIENT,)),
    # Molchanov et al. (1906.10771): the same, of each batch alone.
    "taylor": OfWeights(lambda w, seen, key: jnp.abs(w) * seen.absolute, (ABSOLUTE,)),
    # Optimal Brain Damage, with Fisher's information for the curvature (1801.05787): what the loss rises by where its
    # gradient is zero. With a first-order term added, signs of the gradient decide, and half of them are a bad half.
    "taylor_second_order": OfWeights(lambda w, seen, key: 0.5 * jnp.square(w) * seen.square, (SQUARE,)),
    # Movement pruning (2005.07683): a weight that training moves away from zero matters.
    "movement": OfWeights(lambda w, seen, key: -w * seen.gradient, (GRADIENT,), sums=True),
    "activation": OfWeights(lambda w, seen, key: jnp.broadcast_to(jnp.sqrt(seen.inputs)[:, None], w.shape), (INPUTS,)),
    # Wanda (2306.11695): the size of what a weight adds to its output.
    "wanda": OfWeights(lambda w, seen, key: jnp.abs(w) * jnp.sqrt(seen.inputs)[:, None], (INPUTS,)),
    # The curvature of the loss, inputs and gradients of outputs taken as independent (1503.05671): Wanda, where outputs
    # count as much as the loss depends on them.
    "fisher": OfWeights(
        lambda w, seen, key: jnp.square(w) * seen.inputs[:, None] * jnp.diagonal(seen.outputs), (INPUTS, OUTPUTS)
    ),
    # Optimal Brain Surgeon's, of each matrix by itself (as in 2301.00774): what is lost once the others make up for it.
    "surgeon": OfWeights(
        lambda w, seen, key: jnp.square(w) * _alone(seen)[:, None],
        (PRODUCTS,),
    ),
    # Mutual information, all taken as Gaussian, of an output with what only this input tells it, seen through as much
    # noise as the loss does not notice: `surgeon` and `fisher` in one. (Entropies of inputs order as `activation`.)
    "information": OfWeights(
        lambda w, seen, key: 0.5 * jnp.log1p(jnp.square(w) * jnp.diagonal(seen.outputs) * _alone(seen)[:, None]),
        (PRODUCTS, OUTPUTS),
    ),
    "random": OfWeights(lambda w, seen, key: jax.random.uniform(key, w.shape)),
}


def of_weights(name: str, where: str) -> OfWeights:
    """Finds a score.

    Raises:
      UserError: there is none of this name.
    """
    if name not in WEIGHTS:
        raise UserError(f"{where}: no score '{name}'{nearest(name, WEIGHTS)}; one of: {', '.join(WEIGHTS)}")
    return WEIGHTS[name]


def scores(
    name: str, weights: Mapping[str, Array], seen: Mapping[str, Evidence], key: Array
) -> dict[str, Float[Array, "I O"]]:
    """Returns the score of this name of each matrix, by path."""
    score = WEIGHTS[name].score
    keys = jax.random.split(key, len(seen))
    return {path: score(weights[path], one, own) for (path, one), own in zip(seen.items(), keys)}


# --- units ------------------------------------------------------------------------------------------


def magnitude(cfg: ModelConfig, params: Any) -> dict[Unit, Float[Array, "U"]]:
    """Returns the L2 norm of the matrix entries that touch each unit; of vectors, gains would hide everything else."""
    squares: dict[Unit, Any] = {}
    leaves, counts = paths.flatten(params, is_leaf=is_whole), units.counts(cfg)
    for path, names in units.axes(cfg).items():
        if len(names) < 2:
            continue
        entries = jnp.square(dense(leaves[path]).astype(jnp.float32))
        for axis, unit in enumerate(names):
            if unit is not None:
                others = tuple(other for other in range(len(names)) if other != axis)
                by_unit = jnp.sum(entries, axis=others).reshape(counts[unit], -1).sum(axis=1)
                squares[unit] = squares.get(unit, 0.0) + by_unit
    return {unit: jnp.sqrt(total) for unit, total in squares.items()}


def of_units(cfg: ModelConfig, scores: Mapping[str, Float[Array, "I O"]]) -> dict[Unit, Float[Array, "U"]]:
    """Returns what the scores of weights say of units: the sum over all weights that read from a unit.

    What nothing reads from (keys and values of a group) has the sum over those that write to it.
    """
    reads: dict[Unit, Any] = {}
    writes: dict[Unit, Any] = {}
    counts = units.counts(cfg)
    for path, score in scores.items():
        for axis, (unit, found) in enumerate(zip(units.axes(cfg)[path], (reads, writes))):
            if unit is not None:
                by_unit = jnp.sum(score, axis=1 - axis).reshape(counts[unit], -1).sum(axis=1)
                found[unit] = found.get(unit, 0.0) + by_unit
    return writes | reads


def influence(hidden: Sequence[Float[Array, "B T D"]], real: Bool[Array, "B T"]) -> Float[Array, "L"]:
    """Returns how much each layer turns what it reads: 1 - the mean cosine (block influence, arXiv 2403.03853).

    Args:
      hidden: what stands in the stream before each of L layers, and behind the last.
    """
    wide = [x.astype(jnp.float32) for x in hidden]
    norms = [jnp.linalg.norm(x, axis=-1) for x in wide]
    cosines = [
        jnp.sum(a * b, axis=-1) / jnp.maximum(m * n, 1e-20) for a, b, m, n in zip(wide, wide[1:], norms, norms[1:])
    ]
    return jnp.stack([1 - jnp.sum(jnp.where(real, cosine, 0.0)) / jnp.sum(real) for cosine in cosines])


def largest(cfg: ModelConfig, small: ModelConfig, scores: Scores) -> Kept:
    """Returns the units of `cfg` with the highest scores, as many as `small` has of each; of equal ones the first.

    Where groups of heads share a key, and `small` has fewer groups, whole groups are kept by the root of the summed
    squares of key, value and heads; otherwise the best heads of each group.
    """
    scores = {unit: np.asarray(score, np.float64) for unit, score in scores.items()}
    heads: dict[str, dict[int, tuple[int, ...]]] = {"attention": {}, "cross_attention": {}}
    feed_forward = {}
    for i in range(cfg.total_layers):
        before, after = cfg.layer(i), small.layer(i)
        feed_forward[i] = _top(scores[units.feed_forward(i)], after.feed_forward_width)
        for part in units.attention_parts(cfg, i):
            alike = [i]  # layers that have to keep the same heads
            if cfg.positions == "relative" and part == "attention":
                alike = [other for stack in (cfg.encoder_stack, cfg.stack) if i in stack for other in stack]
            of_heads, of_keys = (
                sum(scores[units.heads(other, part, kind)] ** 2 for other in alike) for kind in ("heads", "kv_heads")
            )
            halves = 2 if attention_kinds.kind(getattr(before, part), part).module.two_ways(before) else 1
            by_group = of_heads.reshape(before.kv_heads, -1)
            groups = _top(of_keys + by_group.sum(axis=1), after.kv_heads, halves if before.kv_heads > 1 else 1)
            each = after.heads // after.kv_heads
            best = (_top(by_group[group], each, halves if before.kv_heads == 1 else 1) for group in groups)
            size = by_group.shape[1]
            heads[part][i] = tuple(group * size + n for group, own in zip(groups, best) for n in own)
    hidden = _top(scores[HIDDEN], small.width)
    return Kept(hidden, heads["attention"], heads["cross_attention"], feed_forward)


def _top(scores: np.ndarray, count: int, halves: int = 1) -> tuple[int, ...]:
    """The places of the largest, ascending; as many of either half if `halves` is 2."""
    size = len(scores) // halves
    order = [np.argsort(-part, kind="stable")[: count // halves] for part in scores.reshape(halves, size)]
    return tuple(sorted(int(place) + half * size for half, part in enumerate(order) for place in part))
