"""Softmax attention over all keys: one name, a form per platform, one plain oracle.

`dot_product_attention` picks the form by platform and by what is asked:
  plain     the oracle: products batched over [B, N], softmax in float32; also decodes single tokens on CPU.
  key_major the CPU form, with the backward pass by hand: see `key_major_attention`.
  chunked   the CPU form for long rows: memory linear in the length, see `chunked_attention`.
  fused     `jax.nn.dot_product_attention`: cuDNN flash attention on a GPU in half precision. Not run on a GPU yet.
  splash    the Pallas splash kernel that ships with jax, on TPU, when lengths fit its blocks.
Forms that cannot express a soft-cap, a bias, a cache or a softmax fall back to `plain`, said by `choose`.
Left out: attention dropout (modern recipes drop after the projection), and returning the
probabilities from fused forms (`attention_probabilities` recomputes them for capture).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from fastlm.ops import chunked_attention
from fastlm.ops.key_major_attention import MASKED, key_major
from fastlm.ops.masks import MaskSpec
from fastlm.ops.operators import operator
from fastlm.ops.softmax import Exact, Softmax
from fastlm.parallel import rules
from fastlm.parallel.platforms import target_platform


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
    softmax: Softmax = Exact(),
) -> Float[Array, "B N T S"]:
    """Returns softmax probabilities in float32; query head n uses key head n // (N / K)."""
    b, t, n, h = q.shape
    # Query heads that share a key head are more rows of one product: keys are not repeated.
    rows = jnp.swapaxes(q, 1, 2).reshape(b, k.shape[2], -1, h)
    # Heads first by hand: from a cache, which has them there, nothing is then moved.
    by_head = jnp.swapaxes(k, 1, 2)
    scores = jnp.einsum("BKRH,BKSH->BKRS", rows, by_head, preferred_element_type=jnp.float32) * scale
    scores = softcap(scores.reshape(b, n, t, -1), cap)
    if bias is not None:
        scores = scores + bias
    visible = mask.dense(q.shape[1], k.shape[1])
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    return softmax(scores)


def plain(
    q, k, v, mask: MaskSpec, bias=None, *, scale: float, cap: float = 0.0, softmax: Softmax = Exact()
) -> Float[Array, "B T N H"]:
    """The oracle: probabilities as a matrix, float32 softmax."""
    probabilities = attention_probabilities(q, k, mask, bias, scale=scale, cap=cap, softmax=softmax).astype(v.dtype)
    b, t, n, _ = q.shape
    rows = probabilities.reshape(b, v.shape[2], -1, v.shape[1])
    # Asked for "BRKH", einsum would put the values first, a product for which XLA:CPU has no fast form.
    y = jnp.einsum("BKRS,BKSH->BKRH", rows, jnp.swapaxes(v, 1, 2), preferred_element_type=jnp.float32)
    return jnp.swapaxes(y.reshape(b, n, t, -1), 1, 2).astype(q.dtype)


def fused(
    q, k, v, mask: MaskSpec, bias=None, *, scale: float, cap: float = 0.0, softmax: Softmax = Exact()
) -> Float[Array, "B T N H"]:
    """`jax.nn.dot_product_attention`: cuDNN flash attention in half precision on a GPU, else XLA. No soft-cap."""
    del cap, softmax
    width = v.shape[-1]
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - width)])  # it wants values as wide as keys
    flash = target_platform() == "gpu" and cudnn_fits(q.shape, k.shape, q.dtype)
    needs_matrix = mask.query_segments is not None or mask.offset is not None
    visible = mask.dense(q.shape[1], k.shape[1]) if needs_matrix else None
    causal = mask.causal and visible is None
    y = jax.nn.dot_product_attention(
        q, k, v, bias, visible, scale=scale, is_causal=causal, implementation="cudnn" if flash else "xla"
    )
    return y[..., :width]


def cudnn_fits(q_shape: tuple, k_shape: tuple, dtype: Any) -> bool:
    """Whether cuDNN's flash attention takes these; with a mask or a bias it trains on even lengths only."""
    narrow = q_shape[-1] % 8 == 0 and q_shape[-1] <= 128
    return jnp.dtype(dtype).itemsize == 2 and narrow and q_shape[1] % 2 == 0 and k_shape[1] % 2 == 0


def splash(
    q,
    k,
    v,
    mask: MaskSpec,
    bias=None,
    *,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
    pattern: Callable[[tuple[int, int]], Any] | None = None,
) -> Float[Array, "B T N H"]:
    """The TPU splash kernel: block-sparse flash attention, causal or full, with segments and soft-cap.

    The compiler cannot cut a kernel, so under a mesh each device runs it on its own rows and heads.

    Args:
      pattern: makes of (T, S) the kernel's static mask (`splash_attention_mask`), instead of what `mask.causal` says:
        blocks in which nothing is visible cost nothing.
    """
    del bias, softmax
    group = q.shape[2] // k.shape[2]
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q * scale, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)))
    segments = None if mask.query_segments is None else (mask.query_segments, mask.key_segments)
    attend = functools.partial(_splash_on_one_device, pattern=pattern or _causal_or_full(mask.causal), cap=cap)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        heads = rules.partition_spec(("batch", "heads", None, None), q.shape, mesh)
        rows = PartitionSpec(heads[0])
        # Values vary over the mesh as the specs say; the kernel does not declare that of its results.
        attend = jax.shard_map(attend, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return jnp.swapaxes(attend(q, k, v, segments), 1, 2).astype(q.dtype)


def _causal_or_full(causal: bool) -> Callable[[tuple[int, int]], Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    return masks.CausalMask if causal else masks.FullMask


def splash_window(back: int, ahead: int) -> Callable[[tuple[int, int]], Any]:
    """Returns the pattern of a window: so many tokens behind and ahead of each."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    return lambda shape: masks.LocalMask(shape, (back, ahead), 0)


def splash_table(visible: np.ndarray) -> Callable[[tuple[int, int]], Any]:
    """Returns the pattern that a boolean matrix [T, S] says; the kernel skips blocks in which nothing is visible."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    return lambda shape: masks.NumpyMask(visible[: shape[0], : shape[1]])


def splash_runs(q: Array, k: Array, mask: MaskSpec, softmax: Softmax) -> bool:
    """Whether the kernel runs on this platform, and takes what a sparse kind asks for."""
    return target_platform() == "tpu" and softmax.fused and splash_fits(q.shape, k.shape, mask, None)


def _splash_on_one_device(q, k, v, segments, *, pattern, cap: float) -> Float[Array, "B N T H"]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    one = pattern((q.shape[2], k.shape[2]))
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * q.shape[1]), head_shards=1, q_seq_shards=1, attn_logits_soft_cap=cap or None
    )
    if segments is not None:
        segments = kernel.SegmentIds(*segments)
    return jax.vmap(attend, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)


FORMS: dict[str, Callable[..., Array]] = {
    "plain": plain,
    "key_major": key_major,
    "chunked": chunked_attention.chunked,
    "fused": fused,
    "splash": splash,
}
LONG = 1024  # tokens from which the chunked form is the faster one on a CPU


def splash_fits(q_shape: tuple, k_shape: tuple, mask: MaskSpec, bias) -> bool:
    """Whether the kernel's blocks of 128 divide lengths and head width, and nothing is asked that it lacks."""
    blocks = q_shape[1] % 128 == 0 and k_shape[1] % 128 == 0 and q_shape[3] % 128 == 0
    return blocks and bias is None and mask.offset is None


def choose(
    platform: str, q_shape: tuple, k_shape: tuple, mask: MaskSpec, bias, cap: float, softmax: Softmax = Exact()
) -> str:
    """Returns the name of the fastest form that can do what is asked on `platform`."""
    if platform != "cpu" and not softmax.fused:
        return "plain"
    if platform == "tpu":
        return "splash" if splash_fits(q_shape, k_shape, mask, bias) else "plain"
    if platform in ("gpu", "cuda", "rocm"):
        return "plain" if cap else "fused"
    if min(q_shape[1], k_shape[1]) >= LONG and chunked_attention.fits(mask, bias, softmax):
        return "chunked"
    return "plain" if q_shape[1] == 1 else "key_major"


@operator
def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: MaskSpec,
    bias: Float[Array, "b N T S"] | None = None,
    *,
    scale: float,
    cap: float = 0.0,
    softmax: Softmax = Exact(),
    form: str = "auto",
) -> Float[Array, "B T N H"]:
    """Attends with the form named, or with the best one for this platform (`form="auto"`).

    Values may be narrower than keys, and the result is as wide as they are.
    """
    if form == "auto":
        form = choose(target_platform(), q.shape, k.shape, mask, bias, cap, softmax)
    if form == "splash" and not splash_fits(q.shape, k.shape, mask, bias):
        form = "plain"  # initialisation and single tokens are shorter than a block
    if form == "fused" and cap:
        form = "plain"
    if form == "chunked" and not chunked_attention.fits(mask, bias, softmax):
        form = "key_major"
    return FORMS[form](q, k, v, mask, bias, scale=scale, cap=cap, softmax=softmax)
