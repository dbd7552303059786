"""A teacher's distribution of the next token, kept as a few ids with weights.

  sampled  ids drawn from a proposal q proportional to p^t, each with the weight p / q over the number of draws. The
           expected weight of every token is p, so whatever is linear in them, cross-entropy and its gradient above all,
           has the value and gradient of the whole distribution in expectation (arXiv 2503.16870). With t = 1 weights
           are counts over draws.
  top_k    the k likeliest ids with their probabilities as they are. Biased: the tail is gone, the weights sum to less
           than 1, and a student that fits them becomes too sure by what is missing.
Notable: draws are stratified, one in each of `draws` equal parts of the proposal. That is as unbiased as independent
draws and varies less (with t = 1, a token is counted within 2 of draws x p), and ids come out sorted, so
that equal ones are neighbours. The proposal is summed in whole numbers, 2^30 shares: sums of 50,000 fractions do not
always rise, and where they rise by rounding alone, a token of probability 0 could be drawn.
What is unbiased is so up to rounding: 2^-15 of a token's probability, and 2^-23 beside.
Left out: dividing the weights of t != 1 by their sum, which would bias them.

Dims: V vocabulary, K slots; a slot that is not needed has id 0 and weight 0.
"""

import dataclasses
import math
from abc import ABC, abstractmethod

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm import configuration
from fastlm.errors import UserError, nearest

_SHARES = 1 << 30
_GROUP = 32
_MOST_DRAWS = 4096  # their squares have to fit in 31 bits


@flax.struct.dataclass
class SparseTargets:
    """What is kept of a teacher's distributions.

    Attributes:
      ids: tokens, int32.
      weights: of them, float32.
      entropy: of the whole distribution, in nats: cross-entropy less this is the divergence from the teacher.
      best: its likeliest token, int32.
      log_probability: that of the token that came, in nats: less than 0 its own loss.
    """

    ids: Int[Array, "... K"]
    weights: Float[Array, "... K"]
    entropy: Float[Array, "..."]
    best: Int[Array, "..."]
    log_probability: Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """Which tokens are kept, with which weights; see the header for the subclasses."""

    @abstractmethod
    def slots(self, vocab_size: int) -> int:
        """Returns K."""

    @abstractmethod
    def choose(
        self, logits: Float[Array, "... V"], uniforms: Float[Array, "... U"]
    ) -> tuple[Int[Array, "... K"], Float[Array, "... K"]]:
        """Returns (ids, weights); `uniforms` are random numbers in [0, 1), `randomness` of them."""

    @property
    def randomness(self) -> int:
        """U, how many random numbers a token needs."""
        return 0

    def __call__(
        self, logits: Float[Array, "... V"], uniforms: Float[Array, "... U"], tokens: Int[Array, "..."]
    ) -> SparseTargets:
        """Returns all that is kept where `tokens` came next; `uniforms` is what `row_uniforms` gives."""
        ids, weights = self.choose(logits, uniforms)
        return SparseTargets(ids, weights, *_statistics(logits, tokens))


@dataclasses.dataclass(frozen=True)
class Sampled(Method):
    """So many draws, from a proposal p^t with t = `proposal_exponent`."""

    draws: int = 50
    proposal_exponent: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= _MOST_DRAWS:
            raise UserError(f"sampled: draws must lie between 1 and {_MOST_DRAWS}, got {self.draws}")
        if not 0 < self.proposal_exponent < math.inf:
            raise UserError(f"sampled: proposal_exponent must be positive, got {self.proposal_exponent}")

    @property
    def randomness(self) -> int:
        """See `Method`."""
        return self.draws

    @property
    def weight(self) -> np.float32:
        """Of a draw, times p / q; a factor, since XLA makes one of a division, and rounds otherwise than NumPy."""
        return np.float32(1 / self.draws)

    def slots(self, vocab_size: int) -> int:
        """See `Method`."""
        return min(self.draws, vocab_size)

    def choose(
        self, logits: Float[Array, "... V"], uniforms: Float[Array, "... U"]
    ) -> tuple[Int[Array, "... K"], Float[Array, "... K"]]:
        """See `Method`; ids rise over the slots in use, which come first."""
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        plain = self.proposal_exponent == 1
        proposal = jnp.exp(log_p) if plain else jax.nn.softmax(self.proposal_exponent * log_p, axis=-1)
        shares = jnp.round(proposal * _SHARES).astype(jnp.int32)
        drawn, total = _drawn(shares, uniforms)
        ids, counts = _merged(drawn, self.slots(logits.shape[-1]))
        weights = counts * self.weight
        if plain:
            return ids, weights
        q = jnp.take_along_axis(shares, ids, axis=-1) / total
        p = jnp.exp(jnp.take_along_axis(log_p, ids, axis=-1))
        return ids, jnp.where(counts > 0, weights * p / q, 0.0)


@dataclasses.dataclass(frozen=True)
class TopK(Method):
    """The k likeliest tokens, likeliest first."""

    k: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.k <= _MOST_DRAWS:
            raise UserError(f"top_k: k must lie between 1 and {_MOST_DRAWS}, got {self.k}")

    def slots(self, vocab_size: int) -> int:
        """See `Method`."""
        return min(self.k, vocab_size)

    def choose(
        self, logits: Float[Array, "... V"], uniforms: Float[Array, "... U"]
    ) -> tuple[Int[Array, "... K"], Float[Array, "... K"]]:
        """See `Method`."""
        del uniforms
        log_p, ids = jax.lax.top_k(
            jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), self.slots(logits.shape[-1])
        )
        return ids, jnp.exp(log_p)


METHODS: dict[str, type[Method]] = {"sampled": Sampled, "top_k": TopK}


def make(spec: str, where: str = "method") -> Method:
    """Returns the method that a name with options describes: "sampled(draws=50)", "top_k(k=32)".

    Raises:
      UserError: no such method or option, or a value out of range.
    """
    name, options = configuration.call(spec, where)
    if name not in METHODS:
        raise UserError(
            f"{where}: unknown method '{name}'{nearest(name, METHODS) or '; one of: ' + ', '.join(METHODS)}"
        )
    return configuration.make(METHODS[name], f"{where}: {name}", options)


def describe(method: Method) -> str:
    """Returns the spec of a method with every option, from which `make` makes it again."""
    name = next(name for name, kind in METHODS.items() if type(method) is kind)
    options = ", ".join(f"{key}={value!r}" for key, value in dataclasses.asdict(method).items())
    return f"{name}({options})"


def top_k(logits: Float[Array, "... V"], k: int) -> tuple[Int[Array, "... K"], Float[Array, "... K"]]:
    """Returns the k likeliest ids and their probabilities, which are not made to sum to 1."""
    return TopK(k).choose(logits, jnp.zeros((*logits.shape[:-1], 0)))


def sampled(
    logits: Float[Array, "... V"], rng: Array, draws: int, proposal_exponent: float = 1.0
) -> tuple[Int[Array, "... K"], Float[Array, "... K"]]:
    """Returns ids and weights of random draws, whose expectation is the whole distribution; K is min(draws, V)."""
    uniforms = jax.random.uniform(rng, (*logits.shape[:-1], draws))
    return Sampled(draws, proposal_exponent).choose(logits, uniforms)


def row_uniforms(method: Method, seed: int, rows: Int[Array, "B"], length: int) -> Float[Array, "B T U"]:
    """Returns a method's random numbers for rows of `length` tokens.

    They follow from the seed and each row's number alone, so that they are the same in whatever batch, chunk or
    process a row is seen.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), (length, method.randomness)))(rows)


def _statistics(logits: Array, tokens: Array) -> tuple[Array, Array, Array]:
    """[..., V], [...] -> entropy, likeliest token, log-probability of `tokens`."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)
    # The first of the largest, by two reductions: XLA:CPU takes longer for an argmax.
    largest = logits >= jnp.max(logits, axis=-1, keepdims=True)
    best = jnp.min(jnp.where(largest, jnp.arange(logits.shape[-1]), logits.shape[-1] - 1), axis=-1)
    return entropy, best, jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def _drawn(shares: Array, uniforms: Array) -> tuple[Array, Array]:
    """[..., V], [..., U] -> rising ids drawn by their shares, [..., U], and the sum of all shares, [..., 1].

    A running sum over the whole vocabulary would take longer than all else: it is taken over sums of groups, and then
    within the group of each draw.
    """
    unused = -shares.shape[-1] % _GROUP
    groups = jnp.pad(shares, [(0, 0)] * (shares.ndim - 1) + [(0, unused)])
    groups = groups.reshape(*shares.shape[:-1], -1, _GROUP)
    ends = jnp.cumsum(jnp.sum(groups, axis=-1), axis=-1)
    points = _stratified(ends[..., -1:], uniforms)
    search = jnp.vectorize(lambda ends, points: jnp.searchsorted(ends, points, side="right"), signature="(g),(u)->(u)")
    group = search(ends, points)
    within = jnp.take_along_axis(groups, group[..., None], axis=-2)
    rest = points - (jnp.take_along_axis(ends, group, axis=-1) - jnp.sum(within, axis=-1))
    place = jnp.sum(jnp.cumsum(within, axis=-1) <= rest[..., None], axis=-1)
    return group * _GROUP + place, ends[..., -1:]


def _stratified(total: Array, uniforms: Array) -> Array:
    """[..., 1], [..., U] -> a whole number in each of U equal parts of 0 .. total - 1, rising."""
    draws = uniforms.shape[-1]
    i = jnp.arange(draws + 1)
    borders = i * (total // draws) + i * (total % draws) // draws  # i * total / draws would not fit in 31 bits
    sizes = jnp.diff(borders)
    return borders[..., :-1] + jnp.minimum((uniforms * sizes).astype(jnp.int32), sizes - 1)


def _merged(ids: Array, slots: int) -> tuple[Array, Array]:
    """[..., U] rising -> the different ones in `slots`, and how often each was there."""

    def merge(ids: Array) -> tuple[Array, Array]:
        slot = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), ids[1:] != ids[:-1]]))
        empty = jnp.zeros(slots, jnp.int32)
        return empty.at[slot].set(ids), empty.at[slot].add(1)

    return jnp.vectorize(merge, signature="(u)->(k),(k)")(ids)
