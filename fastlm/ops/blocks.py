"""Attention of blocks of queries to a few blocks of keys each: what the sparse kinds are made of.

Notable: blocks become rows of a batch, so one dense form (per platform) serves every pattern, with its
hand-written gradient and any softmax; what is masked away inside a block is the price, the rest is never computed.

Dims: B batch, T time, C blocks, b tokens of a block, m keys that a block sees, N heads, K kv heads, H head dim.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fastlm.ops.attention import softcap
from fastlm.ops.key_major_attention import MASKED, key_major_visible, masked
from fastlm.ops.softmax import Exact, Softmax
from fastlm.parallel.platforms import target_platform


def blocked(x: Array, size: int) -> Array:
    """Returns x [B, T, ...] as blocks [B, C, size, ...], zeros behind the end."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def unblocked(x: Array, length: int) -> Array:
    """Returns blocks [B, C, size, ...] as [B, length, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def spans(blocks: Array, count: int, width: int) -> Array:
    """Returns spans i = 0 ... count - 1 of blocks i ... i + width - 1 each, [B, count, width * size, ...].

    Blocks beyond the last are zeros.
    """
    missing = max(count + width - 1 - blocks.shape[1], 0)
    blocks = jnp.pad(blocks, [(0, 0), (0, missing)] + [(0, 0)] * (blocks.ndim - 2))
    return jnp.concatenate([blocks[:, i : i + count] for i in range(width)], axis=2)


def in_groups(
    attend: Callable[..., Array], by_row: Sequence[Array], shared: Sequence[Array], size: int
) -> Float[Array, "B C b N H"]:
    """Returns `attend(*by_row, *shared)` of `size` blocks at a time, computed again in the backward pass.

    Args:
      by_row: arrays [B, C, ...].
      shared: arrays [C, ...].
    """
    count = by_row[0].shape[1]
    if count <= size:
        return attend(*by_row, *shared)
    filled = lambda x, axis: jnp.pad(x, [(0, -count % size if a == axis else 0) for a in range(x.ndim)])
    groups = [jnp.moveaxis(filled(x, 1).reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0) for x in by_row]
    groups += [filled(x, 0).reshape(-1, size, *x.shape[1:]) for x in map(jnp.asarray, shared)]
    y = jax.lax.map(jax.checkpoint(lambda group: attend(*group)), groups)
    return jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :count]


def attend_blocks(
    q: Float[Array, "B C b N H"],
    k: Float[Array, "B C m K H"],
    v: Float[Array, "B C m K H"],
    visible: Bool[Array, "B C b m"] | Float[Array, "B C b m"],
    *,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
) -> Float[Array, "B C b N H"]:
    """Returns each block's softmax attention to its own keys.

    Args:
      visible: which query sees which key, or a constant added to its (capped) score, `MASKED` where it does not; may
        be 1 long in B and in C.
    """
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    options = {"scale": scale, "cap": cap, "softmax": softmax}
    if target_platform() == "cpu":
        by_key = jnp.swapaxes(visible, 2, 3)[:, :, None]
        by_key = flat(jnp.broadcast_to(by_key, (*q.shape[:2], *by_key.shape[2:])))
        return key_major_visible(flat(q), flat(k), flat(v), by_key, **options).reshape(q.shape)
    return _attend_by_query(q, k, v, visible, **options)


def _attend_by_query(q, k, v, visible, *, scale, cap, softmax):
    k, v = (jnp.repeat(x, q.shape[3] // x.shape[3], axis=3) for x in (k, v))
    scores = jnp.einsum("BCqNH,BCkNH->BCNqk", q, k, preferred_element_type=jnp.float32) * scale
    p = softmax(masked(softcap(scores, cap), visible[:, :, None])).astype(v.dtype)
    y = jnp.einsum("BCNqk,BCkNH->BCqNH", p, v, preferred_element_type=jnp.float32)
    return y.astype(q.dtype)


def weights_by_pair(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    visible: Bool[Array, "B T S"],
    *,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
) -> Float[Array, "B N T S"]:
    """Returns the probabilities of a pattern as a matrix, zero where no key is visible; slow, for looking at them."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    p = softmax(jnp.where(visible[:, None], softcap(scores, cap), MASKED))
    return jnp.where(visible[:, None], p, 0.0)
