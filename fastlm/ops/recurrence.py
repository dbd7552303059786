"""Sums over the past with forgetting, in chunks: the parallel form of linear attention and its gated relatives.

    S_t = a_t S_(t-1) + k_t v_t^T,   y_t = q_t S_t,   0 at the start of a document

Notable: inside a chunk of c tokens this is a masked product of size c x c, between chunks only the state [P, H] passes
on, so T tokens cost O(T (c + P) H) and no step runs token by token. Where documents begin, what comes before is
masked away instead of multiplied by zero decay, whose logarithm would be infinite.
Papers: linear attention arXiv 2006.16236; chunks with decay: RetNet 2307.08621, GLA 2312.06635, Mamba-2 2405.21060.

Dims: B batch, N heads, T time, C chunks, c tokens of a chunk, P width of keys, H width of values.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

CHUNK = 64


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


def decays(log_decay: Float[Array, "B N T"], starts: Bool[Array, "B T"], size: int) -> Decays:
    """Returns the decays of chunks of `size` tokens from log a_t <= 0 and where documents begin."""
    total = jnp.cumsum(chunked(log_decay.astype(jnp.float32), size), axis=-1)
    document = jnp.cumsum(chunked(starts[:, None].astype(jnp.int32), size), axis=-1)
    same = document[..., :, None] == document[..., None, :]
    last, last_document = total[..., -1:], document[..., -1:]
    # Exponents are masked before they are taken: above the diagonal they are positive and may overflow.
    exp = lambda x, kept: jnp.where(kept, jnp.exp(jnp.where(kept, x, 0.0)), 0.0)
    earlier = jnp.tril(jnp.ones((size, size), bool))
    return Decays(
        pairs=exp(total[..., :, None] - total[..., None, :], same & earlier),
        begin=exp(total, document == 0),
        end=exp(last - total, document == last_document),
        whole=exp(last, last_document == 0)[..., 0],
    )


def states(
    added: Float[Array, "B N C P H"], whole: Float[Array, "B N C"], first: Float[Array, "B N P H"]
) -> tuple[Float[Array, "B N C P H"], Float[Array, "B N P H"]]:
    """Returns the state before each chunk, and the one behind the last, from what each chunk adds."""

    def step(state, chunk):
        more, left = chunk
        return left[..., None, None] * state + more, state

    chunks = (jnp.moveaxis(added, 2, 0), jnp.moveaxis(jnp.broadcast_to(whole, added.shape[:3]), 2, 0))
    last, before = jax.lax.scan(step, first, chunks)
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
    added = product("BNCjP,BNCjH->BNCPH", k * left.end[..., None].astype(k.dtype), v)
    before, last = states(added, left.whole, state.astype(jnp.float32))
    carried = product("BNCiP,BNCPH->BNCiH", q * left.begin[..., None].astype(q.dtype), before.astype(q.dtype))
    y = (inside + carried).reshape(*q.shape[:2], -1, v.shape[-1])[:, :, :length]
    return y, last
