"""The CPU form of softmax attention for long rows: exact, with memory linear in the length.

Notable: blocks of queries meet blocks of keys one pair at a time, with a running maximum and sum, and a causal query
block meets no key block behind it, so half of the work is never done. The backward pass computes probabilities again
from the saved log-sum-exp. As in `key_major_attention` they stand keys first, which is how every product gets a form
that XLA:CPU has a fast kernel for; queries are taken in groups that share a key head.
Papers: arXiv 2112.05682 (memory), FlashAttention 2205.14135 (backward pass).
Values may be narrower than keys.
Left out: biases and cached keys (the other forms have them), skipping blocks of other documents.

Dims: B batch, T query time, S key time, K kv heads, G query heads of a group, H head dim, b block, i and j blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.ops.key_major_attention import MASKED
from fastlm.ops.masks import MaskSpec
from fastlm.ops.softmax import Exact, Softmax

BLOCK = 512


class _Shape(NamedTuple):
    """What is static of one call."""

    block: int
    queries: int
    keys: int
    groups: int
    causal: bool
    scale: float
    cap: float


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _pad(x: Array, axis: int, to: int) -> Array:
    return jnp.pad(x, [(0, -x.shape[a] % to if a == axis else 0) for a in range(x.ndim)])


def _block(x: Array, number: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)


def _scores(shape: _Shape, q: Array, k: Array, segments: tuple, i: Array, j: Array) -> tuple[Array, Array]:
    """Returns masked and capped scores of query block i [B, K, G b, H] and key block j, [B, K, b, G b] each."""
    size = shape.block
    capped = _product(k, q, 3, 3) * shape.scale
    if shape.cap:
        capped = jnp.tanh(capped / shape.cap) * shape.cap
    key, query = j * size + jnp.arange(size)[:, None], i * size + jnp.arange(size)
    visible = (key < shape.keys) & ((key <= query) if shape.causal else True)
    visible = jnp.broadcast_to(visible, (size, size))[None, None]
    if segments:
        own, other = (_block(x, at, size, 1) for x, at in zip(segments, (i, j)))
        other = other[:, None, :, None]
        visible = visible & (other == own[:, None, None, :]) & (other != 0)
    return jnp.where(jnp.tile(visible, (1, 1, 1, shape.groups)), capped, MASKED), capped


def _rows(x: Array, shape: _Shape, kv_heads: int) -> Float[Array, "i B K Gb H"]:
    """Queries [B, T, N, H] by block, the heads of a group behind each other."""
    b, t, _, h = x.shape
    x = x.reshape(b, t // shape.block, shape.block, kv_heads, shape.groups, h)
    return jnp.transpose(x, (1, 0, 3, 4, 2, 5)).reshape(t // shape.block, b, kv_heads, -1, h)


def _unrows(x: Float[Array, "i B K Gb H"], shape: _Shape) -> Array:
    count, b, kv_heads, _, h = x.shape
    x = x.reshape(count, b, kv_heads, shape.groups, shape.block, h)
    return jnp.transpose(x, (1, 0, 4, 2, 3, 5)).reshape(b, count * shape.block, -1, h)[:, : shape.queries]


def _last(shape: _Shape, i: Array) -> Array | int:
    """The key block after the last that query block i sees."""
    count = -(-shape.keys // shape.block)
    return jnp.minimum(i + 1, count) if shape.causal else count


def _forward(q, k, v, segments, shape):
    kv_heads, size = k.shape[2], shape.block
    rows = _rows(_pad(q, 1, size), shape, kv_heads)
    keys = jnp.swapaxes(_pad(k, 1, size), 1, 2)
    columns = jnp.transpose(_pad(v, 1, size), (0, 2, 3, 1))
    padded = tuple(_pad(x, 1, size) for x in segments)

    def query_block(block):
        i, q_block = block

        def key_block(j, state):
            most, total, y = state
            scores, _ = _scores(shape, q_block, _block(keys, j, size, 2), padded, i, j)
            higher = jnp.maximum(most, jnp.max(scores, axis=2, keepdims=True))
            p, left = jnp.exp(scores - higher), jnp.exp(most - higher)
            more = _product(_block(columns, j, size, 3), p.astype(v.dtype), 3, 2)
            return higher, total * left + jnp.sum(p, axis=2, keepdims=True), y * left + more

        b, kv, many, _ = q_block.shape
        start = (
            jnp.full((b, kv, 1, many), MASKED),
            jnp.zeros((b, kv, 1, many)),
            jnp.zeros((b, kv, v.shape[-1], many)),
        )
        most, total, y = jax.lax.fori_loop(0, _last(shape, i), key_block, start)
        return jnp.swapaxes(y / total, 2, 3).astype(q.dtype), (most + jnp.log(total))[:, :, 0]

    y, log_total = jax.lax.map(query_block, (jnp.arange(rows.shape[0]), rows))
    return _unrows(y, shape), (q, k, v, segments, y, log_total)


def _backward(shape, residuals, g):
    q, k, v, segments, y, log_total = residuals
    kv_heads, size = k.shape[2], shape.block
    rows, g_rows = (_rows(_pad(x.astype(q.dtype), 1, size), shape, kv_heads) for x in (q, g))
    delta = jnp.sum(g_rows.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)
    keys, values = (jnp.swapaxes(_pad(x, 1, size), 1, 2) for x in (k, v))
    columns = jnp.swapaxes(keys, 2, 3)
    padded = tuple(_pad(x, 1, size) for x in segments)
    add = lambda x, more, j: jax.lax.dynamic_update_slice_in_dim(x, _block(x, j, size, 2) + more, j * size, 2)

    def query_block(sums, block):
        i, q_block, g_block, log_sum, block_delta = block

        def key_block(j, state):
            d_q, d_k, d_v = state
            scores, capped = _scores(shape, q_block, _block(keys, j, size, 2), padded, i, j)
            p = jnp.exp(scores - log_sum[:, :, None])
            d_p = _product(_block(values, j, size, 2), g_block, 3, 3)
            d_scores = (d_p - block_delta[:, :, None]) * p * shape.scale
            if shape.cap:
                d_scores = d_scores * (1 - jnp.square(capped / shape.cap))
            p, d_scores = p.astype(q.dtype), d_scores.astype(q.dtype)
            d_q = d_q + _product(_block(columns, j, size, 3), d_scores, 3, 2)
            return d_q, add(d_k, _product(d_scores, q_block, 3, 2), j), add(d_v, _product(p, g_block, 3, 2), j)

        zeros = jnp.zeros((*q_block.shape[:2], q_block.shape[3], q_block.shape[2]))
        d_q, *sums = jax.lax.fori_loop(0, _last(shape, i), key_block, (zeros, *sums))
        return tuple(sums), jnp.swapaxes(d_q, 2, 3).astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
    blocks = (jnp.arange(rows.shape[0]), rows, g_rows, log_total, delta)
    (d_k, d_v), d_q = jax.lax.scan(query_block, zeros, blocks)
    back = lambda x, like: jnp.swapaxes(x, 1, 2)[:, : shape.keys].astype(like.dtype)
    return _unrows(d_q, shape), back(d_k, k), back(d_v, v), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, segments, shape):
    return _forward(q, k, v, segments, shape)[0]


_attend.defvjp(_forward, _backward)


def chunked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: MaskSpec,
    bias: None = None,
    *,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Attends on CPU without a T x S array; query head n uses key head n // (N / K). Exact gradients for q, k and v."""
    del bias, softmax
    segments = () if mask.query_segments is None else (mask.query_segments, mask.key_segments)
    groups = q.shape[2] // k.shape[2]
    return _attend(q, k, v, segments, _Shape(block, q.shape[1], k.shape[1], groups, mask.causal, scale, cap))


def fits(mask: MaskSpec, bias: Array | None, softmax: Softmax) -> bool:
    """Whether nothing is asked that this form lacks."""
    return bias is None and mask.offset is None and softmax.fused
