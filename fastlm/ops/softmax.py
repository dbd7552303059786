"""Ways to turn scores into probabilities, exchangeable wherever scores exist as an array.

  exact      exp(x - max) / sum.
  exp2       the exponential as 2^(x log2 e): a polynomial for the fraction, the whole part put into the exponent's
             bits, no transcendental function (FlashAttention-4's idea). The relative error of an exponential is at
             most `EXP2_ERROR[degree]`, so that of a probability about twice as much.
  top_k      only the k largest scores of a row count (and those that tie with the k-th).
  threshold  scores so far below the row's largest that all of them together cannot hold more than the share `mass`
             of the probability are skipped: those below max - ln(S / mass) among S scores that are not hidden (so that
             a row gives the same however its scores are laid out with padding and masks). This bound holds for any
             input; `calibrated` finds on given scores the highest threshold that keeps it there, for `margin`.
Notable: the gradient of each is that of the softmax at the probabilities which came out, so a backward pass written
by hand needs nothing but them. For `exp2` this differs from the derivative of its polynomial by as much as its error.
Left out: online forms (running maximum and sum), which fused kernels have for `exact` alone.
"""

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm import configuration
from fastlm.errors import UserError, nearest

# 2^f on [-1/2, 1/2] with the least largest relative error (Remez exchange), lowest coefficient first; and that error.
EXP2 = {
    3: (0.999928074, 0.693260985, 0.242611122, 0.0551716691),
    4: (0.999999261, 0.693121815, 0.240247448, 0.0559178603, 0.00957010191),
    5: (1.00000007, 0.693146967, 0.240221197, 0.0555071327, 0.00967554133, 0.0013276472),
}
EXP2_ERROR = {3: 7.5e-5, 4: 2.7e-6, 5: 3e-7}  # the last is rounding as much as approximation

HIDDEN = -1e29  # masks put scores below
TOP_K_ROUNDING = 1e-6  # relative


@dataclasses.dataclass(frozen=True)
class Softmax(ABC):
    """Scores to probabilities along an axis; see the header for the subclasses.

    Attributes:
      fused: whether kernels that never hold a row of scores compute the same.
    """

    fused = False

    @abstractmethod
    def __call__(self, scores: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
        """Returns float32 probabilities that sum to 1 along `axis`; hidden scores are very negative, not infinite."""


@dataclasses.dataclass(frozen=True)
class Exact(Softmax):
    """exp(x - max) / sum."""

    fused = True

    def __call__(self, scores: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
        """See `Softmax`."""
        return jax.nn.softmax(scores.astype(jnp.float32), axis=axis)


@dataclasses.dataclass(frozen=True)
class Exp2(Softmax):
    """The exponential by a polynomial of this degree."""

    degree: int = 3

    def __post_init__(self) -> None:
        if self.degree not in EXP2:
            raise UserError(f"exp2: degree must be one of {', '.join(map(str, EXP2))}, got {self.degree}")

    def __call__(self, scores: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
        """See `Softmax`."""
        return _exp2_softmax(scores.astype(jnp.float32), axis, self.degree)


@dataclasses.dataclass(frozen=True)
class TopK(Softmax):
    """The k largest scores of a row alone, and what cannot be told from the least of them."""

    k: int = 32

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"top_k: k must be at least 1, got {self.k}")

    def __call__(self, scores: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
        """See `Softmax`."""
        if self.k >= scores.shape[axis]:
            return Exact()(scores, axis)
        scores = jnp.moveaxis(scores.astype(jnp.float32), axis, -1)
        smallest = jax.lax.stop_gradient(jax.lax.top_k(scores, self.k)[0][..., -1:])
        # XLA may compute scores again for the comparison, rounded otherwise than those that were sorted.
        close = TOP_K_ROUNDING * jnp.maximum(jnp.abs(smallest), 1.0)
        return jnp.moveaxis(_softmax_where(scores, scores >= smallest - close, -1), -1, axis)


@dataclasses.dataclass(frozen=True)
class Threshold(Softmax):
    """Scores above max - margin alone; a margin of 0 is derived from `mass`, the share that may be lost."""

    mass: float = 1e-3
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1 or not self.margin >= 0:
            raise UserError(
                f"threshold: mass must lie between 0 and 1 and margin must not be negative, got {self.mass} and "
                f"{self.margin}"
            )

    def __call__(self, scores: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
        """See `Softmax`."""
        scores = scores.astype(jnp.float32)
        shown = jnp.sum(scores > HIDDEN, axis=axis, keepdims=True)
        margin = self.margin or jnp.log(jnp.maximum(shown, 1) / self.mass)
        floor = jax.lax.stop_gradient(jnp.max(scores, axis=axis, keepdims=True)) - margin
        return _softmax_where(scores, scores >= floor, axis)


KINDS: dict[str, type[Softmax]] = {"exact": Exact, "exp2": Exp2, "top_k": TopK, "threshold": Threshold}


@functools.lru_cache
def make(spec: str) -> Softmax:
    """Returns the softmax that a name with options describes: "exact", "top_k(k=16)".

    Raises:
      UserError: no such kind or option, or a value out of range.
    """
    where = "config.model.softmax"
    name, options = configuration.call(spec, where)
    if name not in KINDS:
        hint = nearest(name, KINDS) or f"; one of: {', '.join(KINDS)}"
        raise UserError(f"{where}: unknown kind '{name}'{hint}")
    with configuration.naming("model.softmax"):
        return configuration.make(KINDS[name], f"model.softmax: {name}", options)


def calibrated(scores: Float[Array, "... S"], mass: float) -> Threshold:
    """Returns the threshold with the least margin at which no row of `scores` loses more than `mass`.

    Logarithms of probabilities serve as scores: what all of a row have in common does not count.
    """
    ordered = jnp.sort(jnp.asarray(scores, jnp.float32), axis=-1, descending=True)
    kept = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # A row has to keep everything up to the first score at which what follows is at most `mass`.
    last = jnp.argmax(kept >= 1 - mass, axis=-1)[..., None]
    margin = jnp.max(ordered[..., :1] - jnp.take_along_axis(ordered, last, axis=-1))
    return Threshold(mass, max(float(jnp.nextafter(margin, jnp.inf)), 1e-6))


def _softmax_where(scores: Array, kept: Array, axis: int) -> Array:
    return jax.nn.softmax(jnp.where(kept, scores, -jnp.inf), axis=axis)


def exp2(x: Float[Array, "..."], degree: int) -> Float[Array, "..."]:
    """Returns 2^x of float32 x <= 0 by a polynomial; below -126 it stays at 2^-126."""
    x = jnp.maximum(x, -126.0)
    whole = jnp.round(x)
    fraction, y = x - whole, jnp.zeros_like(x)
    for coefficient in reversed(EXP2[degree]):
        y = y * fraction + coefficient
    scale = jax.lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32)
    return y * scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _exp2_softmax(scores: Array, axis: int, degree: int) -> Array:
    powers = exp2((scores - jnp.max(scores, axis=axis, keepdims=True)) * math.log2(math.e), degree)
    return powers / jnp.sum(powers, axis=axis, keepdims=True)


@_exp2_softmax.defjvp
def _exp2_softmax_jvp(axis: int, degree: int, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    p = _exp2_softmax(primals[0], axis, degree)
    return p, p * (tangents[0] - jnp.sum(p * tangents[0], axis=axis, keepdims=True))
