"""Performer: the softmax kernel by random features (FAVOR+), so that linear attention estimates softmax attention.

    exp(s q.k) = E[phi(q) . phi(k)],   phi_p(x) = exp(w_p . x' - |x'|^2 / 2),   x' = sqrt(s) x,   w_p ~ N(0, I)

Cost: time O(T (c + H) P), memory O(T P), for P features in chunks of c tokens. Decoding keeps one P x (H + 1) sum per
head, whatever T is.
Notable: features are positive, and orthogonal in groups of H, which lowers the variance; all heads share them. A
training step draws new ones, evaluation uses those of a fixed seed. So does whatever has a memory, in training as well:
sums fit only the features they were made of.
Exponentials are kept in range without a word about other tokens. A query is divided by its largest feature, and
|q'|^2 is left out of it: both cancel in the normalization. For keys that meet in one sum the factor would have to be
one for all, also for those that come in a later step (the paper's code takes the maximum over all keys), so they have
none: w.k' - |k'|^2 / 2 is at most |w|^2 / 2, whatever k is, which float32 holds for H up to 100 or so. In wider heads
exponents above 60 are cut to 60, of a key that stands on a direction, where an estimate is of no use. At the other end
the features of a key with s |k|^2 above 170 or so underflow and it is not seen; QK-norm keeps keys at s |k|^2 = H^0.5.
Paper: Rethinking Attention with Performers, arXiv 2009.14794.
Left out: its other features (trigonometric, ReLU), features per head, redrawing every so many steps instead of each.

Dims: B batch, T time, S key time, D embed, N heads, H head dim, P features.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fastlm.errors import UserError
from fastlm.models.attention.linear import LinearAttention, Sums, feature_dtype
from fastlm.models.config import LayerConfig

LARGEST = 60.0  # exponent of a key's feature: float32 ends at 88, which leaves room to sum over a long text


@dataclasses.dataclass(frozen=True)
class PerformerOptions:
    """Options of "performer".

    Attributes:
      features: P; 0 for 2 H. The paper's bound on the error asks for about H ln H, at twice the time if H is 64.
      orthogonal: draw features orthogonal to each other, H at a time.
      redraw: each training step draws its own.
      seed: of the features of everything else.
    """

    features: int = 0
    orthogonal: bool = True
    redraw: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.features < 0:
            raise UserError(f"performer: features must not be negative, got {self.features}")

    def count(self, head_dim: int) -> int:
        """Returns P for heads of this width."""
        return self.features or 2 * head_dim


class PerformerAttention(LinearAttention):
    """See the header."""

    floor = 1e-25  # denominators shrink as keys grow

    @staticmethod
    def seen(cfg: LayerConfig, options: PerformerOptions, length: float) -> float:
        """See `Attention`."""
        return options.features or 2 * cfg.head_dim

    @staticmethod
    def empty_cache(cfg: LayerConfig, options: PerformerOptions, batch: int, slots: int, dtype: Any) -> Sums:
        """Returns sums over nothing, in float32 whatever `dtype`."""
        return Sums(jnp.zeros((batch, cfg.heads, options.count(cfg.head_dim), cfg.head_dim + 1), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None,
        *,
        cache: Sums | None = None,
        rng: Array | None = None,
        **look: Any,
    ) -> tuple[Float[Array, "B T D"], Sums | None, dict[str, Any]]:
        """See `Attention`."""
        fixed = cache is not None or not self.options.redraw
        return super().__call__(x, context, cache=cache, rng=None if fixed else rng, **look)

    def map_features(self, q: Array, k: Array, rng: Array | None) -> tuple[Array, Array]:
        """See `LinearAttention`."""
        options, width = self.options, self.cfg.head_dim
        drawn = (options.count(width), width, options.orthogonal)
        w = fixed_directions(options.seed, *drawn) if rng is None else directions(rng, *drawn)
        return positive_features(q, k, w, self.cfg.attention_scale)

    def _normalized(self, total: Float[Array, "B N T H1"]) -> Float[Array, "B T D"]:
        # Divided in two steps, because the square of a small denominator, in the gradient, would underflow.
        total = total / jax.lax.stop_gradient(jnp.maximum(total[..., -1:], self.floor))
        y = total[..., :-1] / jnp.maximum(total[..., -1:], 0.5)  # by 1, or 0.5 in rows that see nothing
        return self.output(jnp.swapaxes(y, 1, 2).astype(self.compute.jnp_dtype))


def positive_features(
    q: Float[Array, "B N T H"], k: Float[Array, "B N S H"], w: Float[Array, "P H"], scale: float
) -> tuple[Float[Array, "B N T P"], Float[Array, "B N S P"]]:
    """Returns the features of queries, each query's up to a factor of its own, and of keys."""
    # Rounded once, for queries and keys alike, so that in half precision too both use the same features.
    w = (w * math.sqrt(scale)).astype(q.dtype)
    exponent = lambda x: jnp.einsum("BNTH,PH->BNTP", x, w, preferred_element_type=jnp.float32)
    query, square = exponent(q), jnp.sum(jnp.square(k.astype(jnp.float32)), axis=-1, keepdims=True)
    query = query - jax.lax.stop_gradient(jnp.max(query, axis=-1, keepdims=True))
    key = jnp.minimum(exponent(k) - scale / 2 * square, LARGEST)
    return jnp.exp(query).astype(feature_dtype(q)), jnp.exp(key).astype(feature_dtype(k))


def directions(key: Array, count: int, width: int, orthogonal: bool = True) -> Float[Array, "P H"]:
    """Returns `count` draws of N(0, I); if `orthogonal`, those of each group of `width` are so to each other."""
    for_rows, for_squares = jax.random.split(key)
    rows = jax.random.normal(for_rows, (count, width))
    if not orthogonal:
        return rows
    return _turned(rows, jax.random.normal(for_squares, (-(-count // width), width, width)), jnp)


@functools.lru_cache(maxsize=64)
def fixed_directions(seed: int, count: int, width: int, orthogonal: bool) -> np.ndarray:
    """Returns `directions` as a constant: the same wherever a model runs, and not drawn again by a decoding step."""
    draw = np.random.default_rng(seed).standard_normal
    rows = draw((count, width))
    if orthogonal:
        rows = _turned(rows, draw((-(-count // width), width, width)), np)
    return rows.astype(np.float32)


def _turned(rows: Any, squares: Any, numpy: Any) -> Any:
    """Directions from random squares [C, H, H], lengths from `rows` [P, H]; `numpy` is that or jax's."""
    rotations, triangles = numpy.linalg.qr(squares)
    signs = numpy.sign(numpy.diagonal(triangles, axis1=-2, axis2=-1))  # with them all rotations are equally likely
    rotations = (rotations * signs[:, None]).reshape(-1, rows.shape[1])
    return rotations[: len(rows)] * numpy.linalg.norm(rows, axis=-1, keepdims=True)
