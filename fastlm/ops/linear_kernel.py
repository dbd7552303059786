"""Linear attention's sums over the past as one Pallas kernel for TPUs; its oracle is `recurrence.linear_recurrence`.

Notable: the state stays on the chip while the chunks of a row pass by, so it is never written to memory, and nothing of
size T x T nor a state per chunk exists. All three gradients are the same sum with the parts exchanged, two of them read
backwards in time, so the kernel is its own backward pass:
  y_t = sum_{j <= t} (q_t . k_j) v_j;   dq_t = sum_{j <= t} (dy_t . v_j) k_j
  dk_t = sum_{i >= t} (v_t . dy_i) q_i;   dv_t = sum_{i >= t} (k_t . q_i) dy_i
Compiled for TPU v5e ahead of time, run only by the interpreter so far.
Left out: decay (the gated kinds run as XLA compiles them).

Dims: B batch, N heads, T time, C chunks, c tokens of a chunk, P width of keys, H width of values.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from fastlm.parallel import rules

CHUNK = 128  # the width of the chip's vectors


def _kernel(column_ref, row_ref, q_ref, k_ref, v_ref, first_ref, y_ref, last_ref, state_ref, document_ref):
    """One chunk of one head; the grid's last axis walks over the chunks of a row in order."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state_ref[...] = first_ref[0, 0]
        document_ref[...] = jnp.zeros_like(document_ref)

    column, row = column_ref[0], row_ref[0]  # the documents of the chunk's tokens, [c, 1] and [1, c]
    q, k, v, state, going_on = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0], state_ref[...], document_ref[...]
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    shape = (q.shape[0],) * 2
    earlier = jax.lax.broadcasted_iota(jnp.int32, shape, 0) >= jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    weights = jnp.where((column == row) & earlier, dot(q, k, (((1,), (1,)), ((), ()))), 0.0)
    carried = dot(jnp.where(column == going_on, q, 0), state.astype(q.dtype), (((1,), (0,)), ((), ())))
    y_ref[0, 0] = dot(weights.astype(v.dtype), v, (((1,), (0,)), ((), ()))) + carried
    last = jnp.max(row, axis=1, keepdims=True)
    added = dot(jnp.where(column == last, k, 0), v, (((0,), (0,)), ((), ())))
    state_ref[...] = jnp.where(last == going_on, state, 0.0) + added
    document_ref[...] = last
    last_ref[0, 0] = state_ref[...]


def _run(q, k, v, documents, state, chunk: int, interpret: bool) -> tuple[Array, Array]:
    """Returns (y, the state behind the last token) of whole chunks; `documents` [B, T] rise from 0."""
    (b, n, t, p), h = q.shape, v.shape[-1]
    of_head = lambda width: pl.BlockSpec((1, 1, chunk, width), lambda b, n, c: (b, n, c, 0))
    whole = pl.BlockSpec((1, 1, p, h), lambda b, n, c: (b, n, 0, 0))
    return pl.pallas_call(
        _kernel,
        grid=(b, n, t // chunk),
        in_specs=[
            pl.BlockSpec((1, chunk, 1), lambda b, n, c: (b, c, 0)),
            pl.BlockSpec((1, 1, chunk), lambda b, n, c: (b, 0, c)),
            *(of_head(p), of_head(p), of_head(h), whole),
        ],
        out_specs=[of_head(h), whole],
        out_shape=[jax.ShapeDtypeStruct((b, n, t, h), jnp.float32), jax.ShapeDtypeStruct((b, n, p, h), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((p, h), jnp.float32), pltpu.VMEM((1, 1), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(documents[:, :, None], documents[:, None, :], q, k, v, state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _sums(q, k, v, documents, state, chunk, interpret):
    return _run(q, k, v, documents, state, chunk, interpret)


def _sums_forward(q, k, v, documents, state, chunk, interpret):
    return _run(q, k, v, documents, state, chunk, interpret), (q, k, v, documents, state)


def _sums_backward(chunk, interpret, residuals, gradients):
    q, k, v, documents, state = residuals
    dy, d_last = gradients
    dy = dy.astype(v.dtype)
    flip, turned = (lambda x: jnp.flip(x, axis=2)), (lambda x: jnp.swapaxes(x, 2, 3))
    backwards = documents[:, -1:] - jnp.flip(documents, axis=1)
    d_q, _ = _run(dy, v, k, documents, turned(state), chunk, interpret)
    d_k, _ = _run(flip(v), flip(dy), flip(q), backwards, turned(d_last), chunk, interpret)
    d_v, d_state = _run(flip(k), flip(q), flip(dy), backwards, d_last, chunk, interpret)
    return d_q.astype(q.dtype), flip(d_k).astype(k.dtype), flip(d_v).astype(v.dtype), None, d_state


_sums.defvjp(_sums_forward, _sums_backward)


def linear_sums(
    q: Float[Array, "B N T P"],
    k: Float[Array, "B N T P"],
    v: Float[Array, "B N T H"],
    starts: Bool[Array, "b T"],
    state: Float[Array, "B N P H"],
    *,
    chunk: int = CHUNK,
    interpret: bool = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N P H"]]:
    """Returns (sum_{j <= t} (q_t . k_j) v_j over the token's document in float32, the state behind the last token).

    The compiler cannot cut a kernel, so under a mesh each device runs it on its own rows and heads.

    Args:
      starts: where documents begin that are not the row's first, which goes on from `state`; may be 1 long in B.
    """
    length = q.shape[2]
    documents: Int[Array, "B T"] = jnp.broadcast_to(jnp.cumsum(starts, axis=1, dtype=jnp.int32), (q.shape[0], length))
    missing = -length % chunk
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))
    documents = jnp.pad(documents, ((0, 0), (0, missing)), mode="edge")
    run = functools.partial(_on_one_device, chunk=chunk, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        heads = rules.partition_spec(("batch", "heads", None, None), q.shape, mesh)
        specs = (heads, heads, heads, PartitionSpec(heads[0]), heads)
        # Values vary over the mesh as the specs say; the kernel does not declare that of its results.
        run = jax.shard_map(run, in_specs=specs, out_specs=(heads, heads), check_vma=False)
    y, last = run(pad(q), pad(k), pad(v), documents, state.astype(jnp.float32))
    return y[:, :, :length], last


def _on_one_device(q, k, v, documents, state, *, chunk: int, interpret: bool) -> tuple[Array, Array]:
    return _sums(q, k, v, documents, state, chunk, interpret)
