"""Which weights stay: masks of so many ones, by scores.

Notable: counts are exact, whatever is equal: of equal scores the first stay. How many stay may depend on the step, so
that all of it runs inside a jitted one. Global allocation compares scores of different matrices as they are.
Papers: Erdos-Renyi allocation as in SET and RigL (arXiv 1707.04780, 1911.11134); N of M (2104.08378).

Dims: I inputs, O outputs of a matrix.
"""

import math
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.errors import UserError, nearest

Scores = Mapping[str, Float[Array, "I O"]]
Masks = dict[str, Bool[Array, "I O"]]


def largest(scores: Float[Array, "... n"], keep: Int[Array, "..."] | int) -> Bool[Array, "... n"]:
    """Returns ones for exactly `keep` of the last axis, those with the highest scores."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    ranks = jnp.put_along_axis(
        jnp.zeros(scores.shape, jnp.int32),
        order,
        jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape),
        axis=-1,
        inplace=False,
    )
    return ranks < jnp.asarray(keep)[..., None]


def kept(size: int, sparsity: Float[Array, ""] | float) -> Int[Array, ""]:
    """Returns how many of `size` stay."""
    return size - jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)


def by_matrix(scores: Scores, sparsity: Array | float) -> Masks:
    """The same share of each matrix."""
    one = lambda score: largest(score.reshape(-1), kept(score.size, sparsity)).reshape(score.shape)
    return {path: one(score) for path, score in scores.items()}


def by_output(scores: Scores, sparsity: Array | float) -> Masks:
    """The same share of each output of each matrix, as Wanda does (arXiv 2306.11695)."""
    return {path: largest(score.T, kept(score.shape[0], sparsity)).T for path, score in scores.items()}


def over_all(scores: Scores, sparsity: Array | float) -> Masks:
    """The highest scores of all matrices together."""
    flat = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    mask, first, found = largest(flat, kept(flat.size, sparsity)), 0, {}
    for path, score in scores.items():
        found[path] = mask[first : first + score.size].reshape(score.shape)
        first += score.size
    return found


def erdos_renyi(scores: Scores, sparsity: Array | float) -> Masks:
    """Shares that go with (I + O) / (I O): the small matrix keeps more of itself."""
    sizes = jnp.array([score.size for score in scores.values()], jnp.float32)
    raw = jnp.array([sum(score.shape) / score.size for score in scores.values()], jnp.float32)
    wanted = (1 - jnp.asarray(sparsity, jnp.float32)) * jnp.sum(sizes)
    total = lambda factor: jnp.sum(jnp.minimum(1.0, factor * raw) * sizes)

    def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        enough = total(middle) >= wanted
        return jnp.where(enough, ends[0], middle), jnp.where(enough, middle, ends[1])

    _, factor = jax.lax.fori_loop(0, 60, halve, (jnp.zeros(()), 1 / jnp.min(raw)))
    shares = jnp.minimum(1.0, factor * raw)
    one = lambda score, share: largest(score.reshape(-1), kept(score.size, 1 - share)).reshape(score.shape)
    return {path: one(score, share) for (path, score), share in zip(scores.items(), shares)}


ALLOCATIONS: dict[str, Callable[[Scores, Array | float], Masks]] = {
    "matrix": by_matrix,
    "output": by_output,
    "global": over_all,
    "erdos_renyi": erdos_renyi,
}


def allocation(name: str, where: str) -> Callable[[Scores, Array | float], Masks]:
    """Finds how many weights of which matrix stay: a name of `ALLOCATIONS`, or "2:4" for 2 of each 4 inputs.

    Raises:
      UserError: there is none of this name.
    """
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise UserError(f"{where}: '{name}' keeps {n} of each {m} inputs; keep fewer than all, and at least one")
        return lambda scores, sparsity: {path: n_of_m(score, n, m) for path, score in scores.items()}
    if name not in ALLOCATIONS:
        raise UserError(
            f"{where}: no allocation '{name}'{nearest(name, ALLOCATIONS)}; one of: {', '.join(ALLOCATIONS)}, or N:M"
        )
    return ALLOCATIONS[name]


def n_of_m(score: Float[Array, "I O"], n: int, m: int) -> Bool[Array, "I O"]:
    """Returns ones for `n` of each `m` inputs, side by side, of each output; what is left over at the end stays."""
    inputs, outputs = score.shape
    whole = inputs // m * m
    groups = score[:whole].T.reshape(outputs, -1, m)
    mask = largest(groups, n).reshape(outputs, whole).T
    return jnp.concatenate([mask, jnp.ones((inputs - whole, outputs), bool)])


def sparsity(masks: Mapping[str, Bool[Array, "..."]]) -> Float[Array, ""]:
    """Returns the share of zeros."""
    ones = sum(jnp.sum(mask, dtype=jnp.float32) for mask in masks.values())
    return 1 - ones / math.fsum(mask.size for mask in masks.values())
