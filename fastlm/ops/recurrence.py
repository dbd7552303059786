"""Sums over the past with forgetting, in chunks: the parallel form of linear attention and its gated relatives.

    linear   S_t = a_t S_(t-1) + k_t v_t^T,          y_t = q_t S_t,   0 at the start of a document
    gated    S_t = diag(a_t) S_(t-1) + k_t v_t^T,    a decay for each channel of the keys
    delta    S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T

Notable: inside a chunk of c tokens this is a masked product of size c x c, between chunks only the state [P, H] passes
on, so T tokens cost O(T (c + P) H) and no step runs token by token. Where documents begin, what comes before is
masked away instead of multiplied by zero decay, whose logarithm would be infinite. Sums over one axis of a chunk
are products with ones, also in the gradients: as reductions they took XLA:CPU six times as long. The
delta rule leaves much behind for the backward pass: its long rows go in pieces that are computed again there, a third
less memory for a seventh more time.
Papers: linear attention arXiv 2006.16236; chunks with decay: RetNet 2307.08621, GLA 2312.06635, Mamba-2 2405.21060;
delta rule in chunks: DeltaNet 2406.06484, Gated DeltaNet 2412.06464.

Dims: B batch, N heads, T time, C chunks, c tokens of a chunk, P width of keys, H width of values.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 64
# A log decay below is taken as this: nothing is left of the state, and the sums of a chunk keep their last digits.
FORGOTTEN = -20.0
GATED_CHUNK = 32
# The least log decay of a token in `gated_recurrence`: half a chunk of them, and its inverse, are still float32 numbers
# that may be multiplied by a query or key.
LEAST_LOG_DECAY = -64 / (GATED_CHUNK // 2)
EXACT = jax.lax.Precision.HIGHEST  # of sums as products and of what adds up over chunks: matrix units round to bfloat16
BLOCK = 8  # where `unit_lower_inverse` begins
PIECE = 1024  # tokens of long rows that are read at a time, see `in_pieces`

Recurrence = Callable[..., tuple[Array, Array]]  # from arrays [B, N, T, ...], starts [B, T] and a state to (y, state)


@flax.struct.dataclass
class Within:
    """What belongs to one document, chunk by chunk.

    Attributes:
      pairs: token j <= i and token i.
      begin: each token and the state before its chunk.
      end: each token and the state behind its chunk.
      whole: the states before and behind a chunk.
    """

    pairs: Bool[Array, "B 1 C c c"]
    begin: Bool[Array, "B 1 C c"]
    end: Bool[Array, "B 1 C c"]
    whole: Bool[Array, "B 1 C"]


@flax.struct.dataclass
class Decays:
    """How much of what came earlier is left, chunk by chunk; all between 0 and 1, and 0 across documents.

    Attributes:
      pairs: of token j at token i >= j, 0 for i < j.
      begin: of the state before the chunk, at each token.
      end: of each token, behind the chunk.
      whole: of the state before the chunk, behind it.
    """

    pairs: Float[Array, "B N C c c"]
    begin: Float[Array, "B N C c"]
    end: Float[Array, "B N C c"]
    whole: Float[Array, "B N C"]


def chunked(x: Array, size: int) -> Array:
    """Returns x [B, N, T, ...] as chunks [B, N, C, size, ...], zeros behind the end."""
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % size)] + [(0, 0)] * (x.ndim - 3))
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def within_documents(starts: Bool[Array, "B T"], size: int) -> Within:
    """Returns what stays in one document in chunks of `size` tokens."""
    document = jnp.cumsum(chunked(starts[:, None].astype(jnp.int32), size), axis=-1)
    last = document[..., -1:]
    same = document[..., :, None] == document[..., None, :]
    return Within(
        pairs=same & jnp.tril(jnp.ones((size, size), bool)),
        begin=document == 0,
        end=document == last,
        whole=(last == 0)[..., 0],
    )


def decays(log_decay: Float[Array, "B N T"], starts: Bool[Array, "B T"], size: int) -> Decays:
    """Returns the decays of chunks of `size` tokens from log a_t <= 0 and where documents begin."""
    log_decay = chunked(jnp.maximum(log_decay.astype(jnp.float32), FORGOTTEN), size)
    total, within = jnp.cumsum(log_decay, axis=-1), within_documents(starts, size)
    last = total[..., -1:]
    return Decays(
        pairs=exp_differences(total, within.pairs),
        begin=exp_where(within.begin, total),
        end=exp_where(within.end, last - total),
        whole=exp_where(within.whole, last[..., 0]),
    )


def exp_where(kept: Bool[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) where `kept`, else 0; exponents are masked before they are taken, as the others may overflow."""
    return jnp.where(kept, jnp.exp(jnp.where(kept, x, 0.0)), 0.0)


def states(
    added: Float[Array, "B N C P H"],
    left: Float[Array, "B N C ..."],
    first: Float[Array, "B N P H"],
    keep: Callable[[Array, Array], Array] = lambda left, state: scaled(state, left[..., None]),
) -> tuple[Float[Array, "B N C P H"], Float[Array, "B N P H"]]:
    """Returns the state before each chunk, and the one behind the last.

    Args:
      added: what each chunk adds.
      left, keep: `keep(left, state)` is what a chunk leaves of the state before it.
    """

    def step(state, chunk):
        more, left = chunk
        return keep(left, state) + more, state

    left = jnp.broadcast_to(left, (*added.shape[:3], *left.shape[3:]))
    last, before = jax.lax.scan(step, first, (jnp.moveaxis(added, 2, 0), jnp.moveaxis(left, 2, 0)))
    return jnp.moveaxis(before, 0, 2), last


def product(pattern: str, *arrays: Array) -> Array:
    """`einsum` with float32 sums."""
    return jnp.einsum(pattern, *arrays, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames="chunk")
def linear_recurrence(
    q: Float[Array, "B N T P"],
    k: Float[Array, "B N T P"],
    v: Float[Array, "B N T H"],
    log_decay: Float[Array, "B N T"],
    starts: Bool[Array, "B T"],
    state: Float[Array, "B N P H"],
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N P H"]]:
    """Returns (y in float32, the state behind the last token); see the header.

    Args:
      log_decay: log a_t, at most 0; may be 1 long in B and N. Padding has 0 there and zero keys.
      starts: where documents begin that are not the row's first, which goes on from `state`; may be 1 long in B.
    """
    length = q.shape[2]
    size = min(chunk, length)
    left = decays(log_decay, starts, size)
    q, k, v = (chunked(x, size) for x in (q, k, v))
    weights = product("BNCiP,BNCjP->BNCij", q, k) * left.pairs
    inside = product("BNCij,BNCjH->BNCiH", weights.astype(v.dtype), v)
    added = product("BNCjP,BNCjH->BNCPH", scaled(k, left.end), v)
    before, last = states(added, left.whole, state.astype(jnp.float32))
    carried = product("BNCiP,BNCPH->BNCiH", scaled(q, left.begin), before.astype(q.dtype))
    return _joined(inside + carried, length), last


def in_pieces(recurrence: Recurrence) -> Recurrence:
    """Returns the recurrence with rows longer than `PIECE` read piece by piece, computed again for their gradients."""

    @functools.wraps(recurrence)
    def read(*arrays: Array, **options: Any) -> tuple[Array, Array]:
        *arrays, starts, state = arrays
        length = arrays[0].shape[2]
        if length <= PIECE:
            return recurrence(*arrays, starts, state, **options)
        cut = lambda x: jnp.moveaxis(chunked(x, PIECE), 2, 0)
        pieces = [cut(x) for x in arrays]

        @jax.checkpoint
        def step(state, piece):
            arrays, starts = piece
            y, state = recurrence(*arrays, starts[:, 0], state, **options)
            return state, y

        last, y = jax.lax.scan(step, state.astype(jnp.float32), (pieces, cut(starts[:, None])))
        return _joined(jnp.moveaxis(y, 0, 2), length), last

    return read


@jax.jit
def gated_recurrence(
    q: Float[Array, "B N T P"],
    k: Float[Array, "B N T P"],
    v: Float[Array, "B N T H"],
    log_decay: Float[Array, "B N T P"],
    starts: Bool[Array, "B T"],
    state: Float[Array, "B N P H"],
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N P H"]]:
    """Returns (y in float32, the state behind the last token) with a decay for each channel of the keys.

    The decay between two tokens is no number here but a product inside q . k: each side takes its own part of it,
    measured from the middle of the chunk, where half a chunk of the least decay can neither overflow nor vanish.

    Args:
      log_decay: log a_t, from `LEAST_LOG_DECAY` to 0. Padding has 0 there and zero keys.
      starts: as in `linear_recurrence`.
    """
    length = q.shape[2]
    size = min(GATED_CHUNK, length)
    within = within_documents(starts, size)
    begin, end = within.begin[..., None], within.end[..., None]
    q, k, v = (chunked(x, size) for x in (q, k, v))
    total = running_sum(chunked(log_decay.astype(jnp.float32), size))
    last = total[..., -1:, :]
    middle = jax.lax.stop_gradient(total[..., (size - 1) // 2, None, :])  # nothing depends on where one measures from
    weights = product("BNCiP,BNCjP->BNCij", q * jnp.exp(total - middle), k * jnp.exp(middle - total))
    weights = jnp.where(within.pairs, weights, 0.0)
    inside = product("BNCij,BNCjH->BNCiH", weights.astype(v.dtype), v)
    added = product("BNCjP,BNCjH->BNCPH", (k * exp_where(end, spread(last, size) - total)).astype(k.dtype), v)
    left = exp_where(within.whole[..., None], last[..., 0, :])
    before, final = states(added, left, state.astype(jnp.float32), lambda left, state: scaled(state, left))
    carried = product("BNCiP,BNCPH->BNCiH", (q * exp_where(begin, total)).astype(q.dtype), before.astype(q.dtype))
    return _joined(inside + carried, length), final


@in_pieces
@functools.partial(jax.jit, static_argnames="chunk")
def delta_recurrence(
    q: Float[Array, "B N T P"],
    k: Float[Array, "B N T P"],
    v: Float[Array, "B N T H"],
    log_decay: Float[Array, "B N T"],
    rate: Float[Array, "B N T"],
    starts: Bool[Array, "B T"],
    state: Float[Array, "B N P H"],
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N P H"]]:
    """Returns (y in float32, the state behind the last token) of the delta rule with decay.

    What token i really writes is u_i, its value less what the state already holds under its key. Inside a chunk the
    u solve a triangular system: u = fresh - erased S with S the state before the chunk. So a chunk maps S linearly,
    by a matrix P x P that is made for all chunks at once, and only its product with S runs chunk by chunk.

    Args:
      k: at most of norm 1.
      log_decay, starts: as in `linear_recurrence`.
      rate: b_t, between 0 and 1; 0 of padding.
    """
    length = q.shape[2]
    size = min(chunk, length)
    left = decays(log_decay, starts, size)
    q, k, v, rate = (chunked(x, size) for x in (q, k, v, rate))
    solve = delta_solution(k, left.pairs, rate).astype(v.dtype)
    fresh = product("BNCij,BNCjH->BNCiH", solve, v)
    erased = product("BNCij,BNCjP->BNCiP", solve, scaled(k, left.begin)).astype(k.dtype)
    end = scaled(k, left.end)
    added = product("BNCjP,BNCjH->BNCPH", end, fresh.astype(v.dtype))
    diagonal = jnp.broadcast_to(jnp.eye(k.shape[-1]), (*added.shape[:-1], k.shape[-1]))
    kept = scaled(diagonal, left.whole[..., None]) - product("BNCjP,BNCjR->BNCPR", end, erased)
    keep = functools.partial(jnp.einsum, "BNPR,BNRH->BNPH", precision=EXACT)
    before, last = states(added, kept, state.astype(jnp.float32), keep)
    low = before.astype(q.dtype)
    written = fresh - product("BNCiP,BNCPH->BNCiH", erased, low)
    weights = product("BNCiP,BNCjP->BNCij", q, k) * left.pairs
    inside = product("BNCij,BNCjH->BNCiH", weights.astype(v.dtype), written.astype(v.dtype))
    carried = product("BNCiP,BNCPH->BNCiH", scaled(q, left.begin), low)
    return _joined(inside + carried, length), last


def delta_solution(
    k: Float[Array, "... c P"], pairs: Float[Array, "... c c"], rate: Float[Array, "... c"]
) -> Float[Array, "... c c"]:
    """Returns what each token writes, as weights of the values up to it, before any state: (I + A)^-1 diag(b).

    A is b_i (k_i . k_j) below the diagonal, times the decay between the two (`pairs`).
    """
    overlap = scaled(product("...iP,...jP->...ij", k, k) * pairs, rate)
    return scaled(unit_lower_inverse(jnp.tril(overlap, -1)), rate, columns=True)


_exact = functools.partial(jnp.matmul, precision=EXACT)


@jax.custom_vjp
def unit_lower_inverse(below: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """Returns (I + A)^-1 of A strictly lower triangular, in products of blocks.

    Diagonal blocks of 8 by the series (I - A)(I + A^2)(I + A^4), which ends there; then two neighbours at a time.
    The series of a whole chunk would pass through huge sums that cancel (of equal keys: binomials), and costs more; a
    triangular solve is as fast on CPU but a call that neither partitions nor exports.
    """
    size, block = below.shape[-1], min(BLOCK, below.shape[-1])
    whole = block
    while whole < size:
        whole *= 2
    below = jnp.pad(below, [(0, 0)] * (below.ndim - 2) + [(0, whole - size)] * 2)
    cut = lambda step, row: jnp.stack([below[..., i + row : i + row + block, i : i + block] for i in step], -3)
    power = cut(range(0, whole, block), 0)
    inverse, reach = jnp.eye(block) - power, 2
    while reach < block:
        power, reach = _exact(power, power), reach * 2
        inverse += _exact(inverse, power)
    while block < whole:
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_exact(lower, _exact(cut(range(0, whole, 2 * block), block), upper))
        rows = (jnp.concatenate([upper, jnp.zeros_like(upper)], -1), jnp.concatenate([corner, lower], -1))
        inverse, block = jnp.concatenate(rows, -2), block * 2
    return inverse[..., 0, :size, :size]


def _unit_lower_inverse_backward(inverse: Array, g: Array) -> tuple[Array]:
    turned = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_exact(turned, _exact(g, turned)), -1),)


unit_lower_inverse.defvjp(lambda below: (unit_lower_inverse(below),) * 2, _unit_lower_inverse_backward)


def running_sum(x: Float[Array, "... c P"]) -> Float[Array, "... c P"]:
    """Returns the sum of x up to each place of the axis before the last."""
    return jnp.einsum("ij,...jP->...iP", jnp.tril(jnp.ones((x.shape[-2],) * 2)), x, precision=EXACT)


def sum_rows(x: Float[Array, "... c P"]) -> Float[Array, "... c"]:
    """Returns the sum over the last axis."""
    return jnp.einsum("...cP,P->...c", x, jnp.ones(x.shape[-1]), precision=EXACT)


def sum_columns(x: Float[Array, "... c P"]) -> Float[Array, "... P"]:
    """Returns the sum over the axis before the last."""
    return jnp.einsum("c,...cP->...P", jnp.ones(x.shape[-2]), x, precision=EXACT)


def scaled(x: Float[Array, "... c P"], by: Float[Array, "..."], *, columns: bool = False) -> Float[Array, "... c P"]:
    """Returns x, in its type, with each row times its number in `by` [..., c], or each column times its in [..., P]."""
    return _scaled(x, jnp.broadcast_to(by, (*x.shape[:-2], x.shape[-1 if columns else -2])), columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scaled(x: Array, by: Array, columns: bool) -> Array:
    return x * jnp.expand_dims(by, -2 if columns else -1).astype(x.dtype)


def _scaled_backward(columns: bool, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, by = residuals
    total = (sum_columns if columns else sum_rows)(g.astype(jnp.float32) * x.astype(jnp.float32))
    return _scaled(g, by, columns), total.astype(by.dtype)


_scaled.defvjp(lambda x, by, columns: (_scaled(x, by, columns), (x, by)), _scaled_backward)


@jax.custom_vjp
def exp_differences(x: Float[Array, "... c"], kept: Bool[Array, "... c c"]) -> Float[Array, "... c c"]:
    """Returns exp(x_i - x_j) where `kept`, else 0."""
    return exp_where(kept, x[..., :, None] - x[..., None, :])


def _exp_differences_forward(x: Array, kept: Array) -> tuple[Array, Array]:
    y = exp_differences(x, kept)
    return y, y


def _exp_differences_backward(y: Array, g: Array) -> tuple[Array, None]:
    g = g * y
    return sum_rows(g) - sum_columns(g), None


exp_differences.defvjp(_exp_differences_forward, _exp_differences_backward)


def spread(x: Float[Array, "... 1 P"], size: int) -> Float[Array, "... c P"]:
    """Returns x repeated `size` times along the axis before the last."""
    return jnp.einsum("c,...P->...cP", jnp.ones(size), x[..., 0, :], precision=EXACT)


def both_ways(recurrence: Recurrence, arrays: tuple[Array, ...], starts: Bool[Array, "b T"]) -> Float[Array, "B N T H"]:
    """Returns a recurrence of which the first half of the heads reads forwards and the second half backwards.

    Args:
      recurrence: from arrays and starts to (y, state).
      arrays: [B, N, T, ...] each.
      starts: of documents, read forwards.
    """
    half = arrays[0].shape[1] // 2
    starts = jnp.stack([starts, jnp.flip(jnp.roll(starts, -1, axis=1), axis=1)])
    turned = (jnp.stack([x[:, :half], jnp.flip(x[:, half:], axis=2)]) for x in arrays)
    (forwards, backwards), _ = jax.vmap(recurrence)(*turned, starts)
    return jnp.concatenate([forwards, jnp.flip(backwards, axis=2)], axis=1)


def _joined(y: Float[Array, "B N C c H"], length: int) -> Float[Array, "B N T H"]:
    """Returns chunks as one row of `length` tokens."""
    return y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]
