"""Softmax attention among tokens that hash alike: Reformer's locality-sensitive hashing with shared queries and keys.

A key is its own token's query, normalized. Each of `rounds` rounds hashes the keys by a random rotation (the bucket is
the nearest of the directions +r_1 ... +r_n, -r_1 ... -r_n), sorts the tokens by (bucket, slot) and cuts the order into
chunks; a token sees those of its bucket and document in its own chunk and the one before. It sees itself only where it
sees nothing else. The rounds together are one softmax over the union of what they see: rounds are weighted by their
sums of exponentials, in which a pair counts 1 / n where n rounds have it.

Cost: time O(rounds T (chunk H + buckets / 2) + rounds T log T), memory O(rounds T chunk). Sorting is of plain integers,
slot and bucket in one; the gradient of a permutation is the gather by its inverse, so nothing is added up by index.
Notable: padding sorts behind all tokens. With `buckets=0` there are two per chunk of a row, so what a token hashes to
depends on the length that its row is padded to; a number in its place does not.
Paper: Reformer, arXiv 2001.04451. Keys are scaled to norm sqrt(H), so that a score is the query times a unit vector.
Left out: decoding. Who shares a chunk with a token depends on how many tokens sort before it, later ones among them
(they push the borders of the chunks), so no step can give what the whole row gives. Other softmaxes: the rounds are
joined by their sums of exponentials. Reversible layers, which are no matter of attention.

Dims: B batch, T time, D embed, N heads, K kv heads, H head dim, R rounds, L = R T places in the orders
of all rounds, C chunks, c tokens of a chunk, m keys that a chunk sees.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models.attention.projections import Attention
from fastlm.models.config import LayerConfig
from fastlm.ops.masks import MaskSpec

ITSELF = -1e5  # score of a token for itself: above what is hidden, below everything else
HIDDEN = -1e30
NOWHERE = -8  # place of what stands before the first chunk: next to no chunk of any bucket


@dataclasses.dataclass(frozen=True)
class LshOptions:
    """Options of "lsh".

    Attributes:
      chunk: tokens of one chunk of the sorted order.
      rounds: hashes; a token sees what any of them brings near.
      buckets: of one hash: 1, or even; 0 for two per chunk.
    """

    chunk: int = 64
    rounds: int = 2
    buckets: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.rounds < 1:
            raise UserError(f"lsh: chunk and rounds must be at least 1, got {self.chunk} and {self.rounds}")
        if self.buckets < 0 or (self.buckets % 2 and self.buckets != 1):
            raise UserError(f"lsh: buckets must be 0 (two per chunk), 1 or an even number, got {self.buckets}")

    def buckets_of(self, length: int) -> int:
        """Returns how many buckets a row of `length` tokens is hashed into."""
        return self.buckets or 2 * (length // self.chunk) or 1


class LshAttention(Attention):
    """See the header."""

    @staticmethod
    def seen(cfg: LayerConfig, options: LshOptions, length: float) -> float:
        """See `Attention`."""
        return min(2 * options.chunk * options.rounds, 2 * options.rounds * length)

    @staticmethod
    def check(cfg: LayerConfig, options: LshOptions) -> None:
        """Raises a `UserError` where bucket and slot do not go into one integer."""
        buckets, slots = options.buckets_of(cfg.max_length), cfg.max_length + options.chunk - 1
        if (buckets + 1) << _bits(slots) > 2**31:
            raise UserError(
                f"lsh: {buckets} buckets of rows of {cfg.max_length} tokens cannot be sorted as 32-bit integers; give "
                "fewer buckets or a larger chunk"
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"],
        mask: MaskSpec,
        bias: None = None,
        cache: None = None,
        rng: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], None, dict[str, Any]]:
        """See `Attention`."""
        del context, bias, cache
        cfg, options = self.cfg, self.options
        q = self.heads(x, "qk", cfg.heads, "heads", self.angles(positions))
        v = self.project(x, "v", cfg.kv_heads, "kv_heads")
        count = options.buckets_of(x.shape[1])
        hashed = buckets(jax.lax.stop_gradient(q), rotations(rng, cfg.head_dim, options.rounds, count))
        if mask.key_segments is not None:
            hashed = jnp.where(mask.key_segments[:, None, None] == 0, count, hashed)  # behind all others
        look = {"segments": mask.key_segments, "causal": mask.causal, "scale": cfg.attention_scale}
        look |= {"chunk": min(options.chunk, x.shape[1])}
        y = hashed_attention(q, self.repeated(v), hashed, count=count, **look)
        aux: dict[str, Any] = {}
        if "qkv" in self.capture:
            aux["qkv"] = (q, unit(q), v)
        if "attention" in self.capture:
            aux["attention"] = _matrix(q, hashed, **look)
        return self.output(y), None, aux


def unit(q: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Returns the keys of queries: the same direction, norm sqrt(H)."""
    x = q.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(q.dtype)


def rotations(rng: Array | None, head_dim: int, rounds: int, count: int) -> Float[Array, "R H half"]:
    """Returns the random directions of each round, half as many as buckets; without a key, always the same."""
    return jax.random.normal(jax.random.key(0) if rng is None else rng, (rounds, head_dim, count // 2))


def buckets(q: Float[Array, "B T N H"], rotation: Float[Array, "R H half"]) -> Int[Array, "B N R T"]:
    """Returns the bucket of each token in each round: the argmax over [q r, -q r].

    The product's exponent and leading bits, its place and sign are one integer, whose maximum is a fast reduction where
    argmax is none; two directions within about a 2^(bits of the place - 23)-th of each other may be taken for equal.
    """
    rounds, _, half = rotation.shape
    if not half:
        return jnp.zeros((q.shape[0], q.shape[2], rounds, q.shape[1]), jnp.int32)
    near = jnp.einsum("BTNH,RHP->BNRTP", q.astype(jnp.float32), rotation)
    low = (1 << (2 * half - 1).bit_length()) - 1
    place = 2 * jnp.arange(half) + (near < 0)
    code = jax.lax.bitcast_convert_type(jnp.abs(near), jnp.int32) & ~low | place
    best = jnp.max(code, axis=-1) & low
    return best // 2 + half * (best % 2)


@flax.struct.dataclass
class Order:
    """The tokens of every round as sorted.

    Attributes:
      slot: of the token at each place of the order.
      place: of the token of each slot in the order.
      code: bucket and chunk of the token of each slot in one number: two codes of one bucket differ as their chunks
        do, those of different buckets by more than there are chunks.
    """

    slot: Int[Array, "B N R T"]
    place: Int[Array, "B N R T"]
    code: Int[Array, "B N R T"]

    @property
    def round_slot(self) -> Int[Array, "B N R T"]:
        """`slot` counted through all rounds."""
        return self.slot + self._rounds_before

    @property
    def round_place(self) -> Int[Array, "B N R T"]:
        """`place` counted through all rounds."""
        return self.place + self._rounds_before

    @property
    def _rounds_before(self) -> Array:
        return jnp.arange(self.slot.shape[2])[:, None] * self.slot.shape[3]


def sort_tokens(hashed: Int[Array, "B N R T"], chunk: int) -> Order:
    """Sorts the tokens of each row by (bucket, slot)."""
    length = hashed.shape[-1]
    bits = _bits(length)
    key = jnp.sort((hashed << bits) | jnp.arange(length), axis=-1)
    slot = key & ((1 << bits) - 1)
    options = {"unique_indices": True, "mode": "promise_in_bounds"}
    inverted = lambda slot: jnp.zeros_like(slot).at[slot].set(jnp.arange(length, dtype=slot.dtype), **options)
    place = jax.vmap(jax.vmap(jax.vmap(inverted)))(slot)
    return Order(slot, place, hashed * (2 * -(-length // chunk)) + place // chunk)


def _bits(length: int) -> int:
    return max(length - 1, 1).bit_length()


def hashed_attention(
    q: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    hashed: Int[Array, "B N R T"],
    *,
    segments: Int[Array, "B T"] | None,
    causal: bool,
    chunk: int,
    count: int,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Returns attention of each token to those that some round brings near it.

    Args:
      hashed: bucket of each token in each round, below `count`; `count` itself of padding.
      segments: document of each token, 0 for padding; a token sees its own document.
    """
    (b, t, n, h), rounds = q.shape, hashed.shape[2]
    missing = -t % chunk
    length = t + missing
    if missing:
        q, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, v))
        hashed = jnp.pad(hashed, [(0, 0)] * 3 + [(0, missing)], constant_values=count)
    order = sort_tokens(hashed, chunk)
    chunks = lambda x: x.reshape(b, n, rounds, length // chunk, chunk, *x.shape[3:])
    sort = lambda x: chunks(_permuted(jnp.swapaxes(x, 1, 2), _joined(order.slot), order.round_place))
    q, v = sort(q), sort(v)
    seen = _labels(order, segments, chunks)
    y, total = _attend_chunks(q, _with_previous(unit(q)), _with_previous(v), seen, causal, scale)
    unsort = lambda x: _permuted(x, _joined(order.round_place), _joined(order.round_slot)[:, :, None])
    y = unsort(y.reshape(b, n, -1, h)).reshape(b, n, rounds, length, h)
    share = jax.nn.softmax(unsort(total.reshape(b, n, -1)).reshape(y.shape[:-1]), axis=2)[..., None]
    y = sum(share[:, :, r] * y[:, :, r] for r in range(rounds))
    return jnp.swapaxes(y[:, :, :t], 1, 2).astype(q.dtype)


def _joined(x: Array) -> Array:
    """[B, N, R, T] as [B, N, L]."""
    return x.reshape(*x.shape[:2], -1)


def _take(x: Array, at: Array) -> Array:
    """x [B, N, I, ...] at [B, N, J]: batched, so that rows and heads may lie on different devices."""
    return jax.vmap(jax.vmap(lambda x, at: x.at[at].get(mode="promise_in_bounds")))(x, at)


@jax.custom_vjp
def _permuted(x: Float[Array, "B N I ..."], at: Int[Array, "B N J"], back: Int[Array, "B N r I"]) -> Array:
    """Returns x at `at`; its row i went to the places back[:, :, :, i], so that the gradient is a gather as well."""
    return _take(x, at)


def _permuted_backward(back: Array, g: Array) -> tuple[Array, None, None]:
    return sum(_take(g, back[:, :, r]) for r in range(back.shape[2])), None, None


_permuted.defvjp(lambda x, at, back: (_take(x, at), back), _permuted_backward)


def _with_previous(x: Array, fill: int = 0) -> Array:
    """Chunks [B, N, R, C, c, ...] each behind the one before it, [B, N, R, C, 2c, ...]."""
    before = jnp.pad(x[:, :, :, :-1], [(0, 0)] * 3 + [(1, 0)] + [(0, 0)] * (x.ndim - 4), constant_values=fill)
    return jnp.concatenate([before, x], axis=4)


@flax.struct.dataclass
class _Labels:
    """What decides who sees whom, of queries [B, N, R, C, c] and keys [B, N, R, C, m].

    Attributes:
      slots: of the tokens.
      code: in the round by which they are sorted here.
      codes: in every round, if there are several.
      documents: None if nobody asked for them.
    """

    slots: tuple[Array, Array]
    code: tuple[Array, Array]
    codes: tuple[tuple[Array, Array], ...]
    documents: tuple[Array, Array] | None


def _labels(order: Order, segments: Array | None, chunks: Any) -> _Labels:
    b, n, rounds, t = order.slot.shape
    slot = _joined(order.slot)
    pair = lambda x: (x, _with_previous(x, NOWHERE))
    sort = lambda x, at: pair(chunks(_take(x, at)))
    codes = tuple(sort(order.code[:, :, r], slot) for r in range(rounds)) if rounds > 1 else ()
    documents = None
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, t - segments.shape[1])))
        documents = sort(jnp.broadcast_to(segments[:, None], (b, n, t)), slot)
    return _Labels(pair(chunks(slot)), sort(_joined(order.code), _joined(order.round_slot)), codes, documents)


def _adjacent(query: Array, key: Array) -> Array:
    """Whether codes are of one bucket, in one chunk or the key's before the query's: whether they differ by 0 or 1."""
    return (query - key).astype(jnp.uint32) <= 1


def _visible(seen: _Labels, causal: bool) -> tuple[Array, Array, Array | None]:
    """Whether a query sees a key, whether it is itself, and how many rounds say so (None of one), [..., m, c]."""
    both = lambda pair: (pair[0][..., None, :], pair[1][..., None])
    query, key = both(seen.slots)
    own = query == key
    visible = _adjacent(*both(seen.code))
    if causal:
        visible &= query >= key
    if seen.documents is not None:
        query, key = both(seen.documents)
        visible &= query == key
    count = sum(_adjacent(*both(pair)).astype(jnp.int8) for pair in seen.codes) if seen.codes else None
    return visible, own, count


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Batched over all but the last two axes, float32 sums."""
    batch = tuple(range(a.ndim - 2))
    axes = ((a.ndim + a_axis,), (b.ndim + b_axis,))
    return jax.lax.dot_general(a, b, (axes, (batch, batch)), preferred_element_type=jnp.float32)


def _forward(q, k, v, seen, causal, scale):
    visible, own, count = _visible(seen, causal)
    # As in `ops.key_major_attention`, keys come first: every product below has the form that XLA:CPU is fast at.
    scores = jnp.where(own, ITSELF, _product(k, q, -1, -1) * scale)
    scores = jnp.where(visible, scores, HIDDEN)
    largest = jnp.max(scores, axis=-2, keepdims=True)
    weights = jnp.exp(scores - largest)
    if count is not None:
        weights = weights / jnp.maximum(count, 1).astype(jnp.float32)
    total = jnp.sum(weights, axis=-2, keepdims=True)
    p = (weights / total).astype(v.dtype)
    y = jnp.swapaxes(_product(jnp.swapaxes(v, -1, -2), p, -1, -2), -1, -2)
    return (y, (largest + jnp.log(total))[..., 0, :]), (q, k, v, p, y)


def _backward(causal, scale, residuals, gradients):
    q, k, v, p, y = residuals
    g, g_total = gradients
    shift = jnp.sum(g * y, axis=-1) - g_total
    g = g.astype(v.dtype)
    d_scores = (_product(v, g, -1, -1) - shift[..., None, :]) * p.astype(jnp.float32)
    # A token's own score is a constant. Where it counts, the token sees nothing else, and the difference is 0 as it is.
    d_scores = (d_scores * scale).astype(q.dtype)
    d_q = jnp.swapaxes(_product(jnp.swapaxes(k, -1, -2), d_scores, -1, -2), -1, -2)
    d_k, d_v = _product(d_scores, q, -1, -2), _product(p, g, -1, -2)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_chunks(
    q: Float[Array, "B N R C c H"],
    k: Float[Array, "B N R C m H"],
    v: Float[Array, "B N R C m H"],
    seen: _Labels,
    causal: bool,
    scale: float,
) -> tuple[Float[Array, "B N R C c H"], Float[Array, "B N R C c"]]:
    """Returns float32 attention of chunks to what they see, and the logarithms of the sums of exponentials."""
    return _forward(q, k, v, seen, causal, scale)[0]


_attend_chunks.defvjp(_forward, _backward)


def _matrix(q, hashed, *, segments, causal, chunk, scale) -> Float[Array, "B N T S"]:
    t = q.shape[1]
    code = sort_tokens(hashed, chunk).code
    visible = jnp.any(_adjacent(code[..., :, None], code[..., None, :]), axis=2)
    visible &= MaskSpec(causal, segments, segments).dense(t, t) if causal or segments is not None else True
    own = jnp.eye(t, dtype=bool)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, unit(q), preferred_element_type=jnp.float32) * scale
    return jax.nn.softmax(jnp.where(own, ITSELF, jnp.where(visible, scores, HIDDEN)), axis=-1)
