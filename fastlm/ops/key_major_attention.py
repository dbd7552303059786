"""The CPU form of softmax attention: probabilities stored key-major, backward written by hand.

Notable: XLA:CPU's fast bfloat16 product wants the contracted axis last on its left operand. With the
probabilities kept transposed, P^T [S, T], every product of the forward and the backward pass has that
form and nothing of size S x T is ever moved:
  S^T = K Q^T, O^T = V^T P^T, dP^T = V dO^T, dV = P^T dO, dK = dS^T Q, dQ^T = K^T dS^T
Only V^T and K^T, of size S x H, are transposed. Groups of query heads that share a key head become
more rows of one product, so keys are never repeated. Softmax is float32, probabilities are stored in
the type of the values; the backward pass reads them back instead of recomputing exponentials.
Left out: blocks that skip what causality hides (more launches than they save at T 256), dropout.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fastlm.ops.layouts import transpose_in_memory
from fastlm.ops.masks import MaskSpec
from fastlm.ops.softmax import Exact, Softmax

MASKED = -1e30  # finite: a query that sees no key averages all of them instead of giving NaN


def _product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Batched over the first two axes, float32 sums."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _query_rows(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K GT H"]:
    b, t, n, h = x.shape
    if n == kv_heads:
        return transpose_in_memory(x, (0, 2, 1, 3))
    x = transpose_in_memory(x.reshape(b, t, kv_heads, n // kv_heads, h), (0, 2, 3, 1, 4))
    return x.reshape(b, kv_heads, -1, h)


def _key_rows(x: Float[Array, "B S K H"]) -> Float[Array, "B K S H"]:
    return transpose_in_memory(x, (0, 2, 1, 3))


def _key_columns(x: Float[Array, "B S K H"]) -> Float[Array, "B K H S"]:
    return transpose_in_memory(x, (0, 2, 3, 1))


def _from_columns(x: Float[Array, "B K H GT"], length: int, dtype: jnp.dtype) -> Float[Array, "B T N H"]:
    b, k, h, rows = x.shape
    x = x.reshape(b, k, h, rows // length, length)
    return jnp.transpose(x, (0, 4, 1, 3, 2)).reshape(b, length, -1, h).astype(dtype)


def visible_by_key(mask: MaskSpec, queries: int, keys: int) -> Bool[Array, "b 1 S T"] | None:
    """`mask.dense` with keys first. Swapping axes of `dense` instead would make XLA transpose the scores."""
    visible = None
    key_slot = jnp.arange(keys)[None, None, :, None]
    if mask.causal:
        query_slot = jnp.arange(queries)[None, None, None, :]
        if mask.offset is not None:
            query_slot = query_slot + mask.offset[:, None, None, None]
        visible = key_slot <= query_slot
    if mask.query_segments is not None:
        key_segment = mask.key_segments[:, None, :, None]
        same = (key_segment == mask.query_segments[:, None, None, :]) & (key_segment != 0)
        visible = same if visible is None else visible & same
    return visible


def masked(scores: Float[Array, "..."], visible: Array) -> Float[Array, "..."]:
    """Hides scores where a boolean `visible` is false; a floating one is added, and hides with `MASKED`."""
    return jnp.where(visible, scores, MASKED) if visible.dtype == bool else scores + visible


def _per_row(x: Array, groups: int) -> Array:
    """[b, 1, S, T] -> [b, 1, S, GT]: the same for each query head of a group."""
    return x if groups == 1 else jnp.tile(x, (1, 1, 1, groups))


def _scores(
    q: Array, k: Array, visible: Array | None, bias: Array | None, scale: float, cap: float
) -> tuple[Array, Array]:
    """Returns masked scores and capped scores before bias and mask, both [B, K, S, GT] float32."""
    (_, t, n, _), (_, s, kv_heads, _) = q.shape, k.shape
    capped = _product(_key_rows(k), _query_rows(q, kv_heads), 3, 3) * scale
    if cap:
        capped = jnp.tanh(capped / cap) * cap
    scores = capped
    if bias is not None:
        grouped = bias.reshape(bias.shape[0], kv_heads, n // kv_heads, t, s)
        scores = scores + jnp.transpose(grouped, (0, 1, 4, 2, 3)).reshape(bias.shape[0], kv_heads, s, -1)
    if visible is not None:
        scores = masked(scores, _per_row(visible, n // kv_heads))
    return scores, capped


def _forward(q, k, v, visible, bias, scale, cap, softmax):
    scores, _ = _scores(q, k, visible, bias, scale, cap)
    probabilities = softmax(scores, axis=2).astype(v.dtype)
    out = _from_columns(_product(_key_columns(v), probabilities, 3, 2), q.shape[1], q.dtype)
    return out, (q, k, v, visible, bias, probabilities, out)


def _bias_gradient(d_scores: Array, bias: Array) -> Array:
    b, kv_heads, s, g, t = d_scores.shape
    d = jnp.transpose(d_scores, (0, 1, 3, 4, 2)).reshape(b, kv_heads * g, t, s)
    return (jnp.sum(d, axis=0, keepdims=True) if bias.shape[0] == 1 else d).astype(bias.dtype)


def _backward(scale, cap, softmax, residuals, g):
    del softmax  # of all of them the gradient is the same function of the probabilities
    q, k, v, visible, bias, probabilities, out = residuals
    (b, t, _, _), (_, s, kv_heads, _) = q.shape, k.shape
    g_rows = _query_rows(g.astype(q.dtype), kv_heads)
    # the row sums of dP * P equal those of dO * O, which are far fewer numbers
    delta = jnp.sum(g_rows.astype(jnp.float32) * _query_rows(out, kv_heads).astype(jnp.float32), axis=-1)
    d_probabilities = _product(_key_rows(v), g_rows, 3, 3)
    d_scores = (d_probabilities - delta[:, :, None, :]) * probabilities.astype(jnp.float32)
    d_bias = None if bias is None else _bias_gradient(d_scores.reshape(b, kv_heads, s, -1, t), bias)
    if cap:
        capped = _scores(q, k, visible, bias, scale, cap)[1].reshape(d_scores.shape)
        d_scores = d_scores * (1 - jnp.square(capped / cap))
    d_scores = (d_scores * scale).astype(q.dtype)
    d_v = _key_rows(_product(probabilities, g_rows, 3, 2)).astype(v.dtype)
    d_k = _key_rows(_product(d_scores, _query_rows(q, kv_heads), 3, 2)).astype(k.dtype)
    d_q = _from_columns(_product(_key_columns(k), d_scores, 3, 2), t, q.dtype)
    return d_q, d_k, d_v, None, d_bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q, k, v, visible, bias, scale, cap, softmax):
    return _forward(q, k, v, visible, bias, scale, cap, softmax)[0]


_attend.defvjp(_forward, _backward)


def key_major(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: MaskSpec,
    bias: Float[Array, "b N T S"] | None = None,
    *,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
) -> Float[Array, "B T N H"]:
    """Attends on CPU; query head n uses key head n // (N / K). Exact gradients for q, k, v and bias."""
    return _attend(q, k, v, visible_by_key(mask, q.shape[1], k.shape[1]), bias, scale, cap, softmax)


def key_major_visible(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    visible: Bool[Array, "b 1 S T"] | Float[Array, "b 1 S T"] | None,
    *,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
) -> Float[Array, "B T N H"]:
    """`key_major` for any pattern: `visible` says, keys first, which query sees which key; see `masked`."""
    return _attend(q, k, v, visible, None, scale, cap, softmax)
