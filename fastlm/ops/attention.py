"""Softmax attention over all keys: one name, a form per platform, one plain oracle.

`dot_product_attention` picks the form by platform and by what is asked:
  plain     the oracle and the CPU form: products batched over [B, N], softmax in float32.
  fused     `jax.nn.dot_product_attention`, which is cuDNN flash attention on a GPU.
  splash    the Pallas splash kernel that ships with jax, on TPU, when lengths fit its blocks.
Forms that cannot express a soft-cap, a bias or a cache fall back to `plain`, said by `choose`.
Left out: attention dropout (modern recipes drop after the projection), and returning the
probabilities from fused forms (`attention_probabilities` recomputes them for capture).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.ops.masks import MaskSpec

MASKED = -1e30  # finite: a row whose keys are all masked gives a uniform average, not NaN


def softcap(scores: Array, cap: float) -> Array:
    """cap * tanh(scores / cap), or the scores themselves when cap is 0 (Gemma 2, arXiv 2408.00118)."""
    return jnp.tanh(scores / cap) * cap if cap else scores


def attention_probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    mask: MaskSpec,
    bias: Float[Array, "b N T S"] | None = None,
    *,
    scale: float,
    cap: float = 0.0,
) -> Float[Array, "B N T S"]:
    """Returns softmax probabilities in float32; query head n uses key head n // (N / K)."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    scores = softcap(scores, cap)
    if bias is not None:
        scores = scores + bias
    visible = mask.dense(q.shape[1], k.shape[1])
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def plain(q, k, v, mask: MaskSpec, bias=None, *, scale: float, cap: float = 0.0) -> Float[Array, "B T N H"]:
    """The oracle: probabilities as a matrix, float32 softmax."""
    probabilities = attention_probabilities(q, k, mask, bias, scale=scale, cap=cap).astype(v.dtype)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("BNTS,BSNH->BTNH", probabilities, v, preferred_element_type=jnp.float32).astype(q.dtype)


def fused(q, k, v, mask: MaskSpec, bias=None, *, scale: float, cap: float = 0.0) -> Float[Array, "B T N H"]:
    """`jax.nn.dot_product_attention`: cuDNN on GPU where it can, XLA elsewhere. No soft-cap."""
    del cap
    needs_matrix = mask.query_segments is not None or mask.offset is not None
    visible = mask.dense(q.shape[1], k.shape[1]) if needs_matrix else None
    causal = mask.causal and visible is None
    return jax.nn.dot_product_attention(q, k, v, bias, visible, scale=scale, is_causal=causal)


def splash(q, k, v, mask: MaskSpec, bias=None, *, scale: float, cap: float = 0.0) -> Float[Array, "B T N H"]:
    """The TPU splash kernel: block-sparse flash attention, causal or full, with segments and soft-cap."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del bias
    queries, heads = q.shape[1], q.shape[2]
    shape = (queries, k.shape[1])
    one = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap or None,
    )
    group = heads // k.shape[2]
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q * scale, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)))
    segments = None
    if mask.query_segments is not None:
        segments = kernel.SegmentIds(mask.query_segments, mask.key_segments)
    out = jax.vmap(attend, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)


FORMS: dict[str, Callable[..., Array]] = {"plain": plain, "fused": fused, "splash": splash}


def choose(platform: str, q_shape: tuple, k_shape: tuple, mask: MaskSpec, bias, cap: float) -> str:
    """Returns the name of the fastest form that can do what is asked on `platform`."""
    if platform == "tpu":
        blocks = q_shape[1] % 128 == 0 and k_shape[1] % 128 == 0 and q_shape[3] % 128 == 0
        return "splash" if blocks and bias is None and mask.offset is None else "plain"
    if platform in ("gpu", "cuda", "rocm"):
        return "plain" if cap else "fused"
    return "plain"


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: MaskSpec,
    bias: Float[Array, "b N T S"] | None = None,
    *,
    scale: float,
    cap: float = 0.0,
    form: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attends with the form named, or with the best one for this platform (`form="auto"`)."""
    if form == "auto":
        form = choose(jax.default_backend(), q.shape, k.shape, mask, bias, cap)
    return FORMS[form](q, k, v, mask, bias, scale=scale, cap=cap)
