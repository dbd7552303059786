"""Programs compiled for TPUs and GPUs that are not there; `python ahead_of_time_programs.py NAME [ARGUMENT]`: JSON.

Run by test_ahead_of_time.py, each in a process of its own, because libtpu is found through the environment.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fastlm.models import Compute, Model, ModelConfig, abstract
from fastlm.models.attention import KINDS
from fastlm.ops import attention
from fastlm.ops.masks import MaskSpec
from fastlm.parallel import mesh as meshes
from fastlm.parallel import rules
from fastlm.tasks import language_modeling
from fastlm.training import optimizers, state
from fastlm.training.precision import LossScale
from fastlm.training.step import make_train_step

VOCABULARY, ROWS, LENGTH = 512, 64, 512
CFG = ModelConfig(vocab_size=VOCABULARY, max_length=LENGTH, layers=2, width=256, heads=2, head_dim=128)


def tpu_mesh(*sizes):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    return Mesh(np.array(devices[: np.prod(sizes)]).reshape(sizes), meshes.AXES, axis_types=(AxisType.Auto,) * 4)


def compile_train_step(mesh):
    """Compiles the train step of a small decoder, donated and sharded as a run's is."""
    model = Model(CFG, Compute(dtype="bfloat16"))
    task = language_modeling.make(model, np.ones(VOCABULARY, np.int32))
    params = jax.eval_shape(lambda: task.init(jax.random.key(0), model.init(jax.random.key(0))))
    optimizer = optimizers.make(name="adamw", learning_rate=1e-3, params=params)
    start = jax.eval_shape(
        lambda: state.create(task, model, optimizer, seed=0, rows=ROWS, average=False, loss_scale=LossScale())
    )
    placement = state.shardings(start, task, mesh)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    everywhere = lambda leaf: place(leaf, NamedSharding(mesh, PartitionSpec()))
    rows = NamedSharding(mesh, rules.partition_spec(("batch", "length"), (ROWS, LENGTH), mesh))
    ids, mask = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ids) | {"loss_mask": mask}
    step = jax.jit(make_train_step(task, optimizer), donate_argnums=0, out_shardings=(placement, None))
    arguments = jax.tree.map(place, start, placement), jax.tree.map(everywhere, task.constants), batch
    with jax.set_mesh(mesh):
        return step.lower(*arguments).compile()


def report(compiled):
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "arguments": memory.argument_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "flops": compiled.cost_analysis()["flops"],
        "collectives": text.count(" all-gather(") + text.count(" all-reduce(") + text.count(" all-gather-start("),
        "splash": "splash_mha_fwd" in text and "splash_mha_d" in text,
        "kernels": text.count("tpu_custom_call"),
    }


def train_step():
    sharded = compile_train_step(tpu_mesh(2, 2, 2, 1))
    return {"sharded": report(sharded), "alone": report(compile_train_step(tpu_mesh(1, 1, 1, 1)))}


def remat():
    """Compiles the gradient of a stack for each policy; so deep that what is stored outweighs the work of a block."""
    mesh = tpu_mesh(1, 1, 1, 1)
    cfg = dataclasses.replace(CFG, layers=4)
    on_chip = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    tokens = on_chip(jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32))
    params = jax.tree.map(on_chip, abstract(cfg)[0])
    found = {}
    with jax.set_mesh(mesh):
        for name in ("none", "products", "full"):
            model = Model(cfg, Compute(dtype="bfloat16", remat=name))
            loss = lambda params, tokens: jnp.sum(model.features(params, tokens)[0].astype(jnp.float32))  # noqa: B023
            found[name] = report(jax.jit(jax.grad(loss)).lower(params, tokens).compile())
    return found


def attention_forms():
    """Compiles the form that is chosen for one TPU, forward and backward, with and without segments."""
    mesh = tpu_mesh(1, 1, 1, 1)
    here = NamedSharding(mesh, PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((2, LENGTH, heads, 128), jnp.bfloat16, sharding=here) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32, sharding=here)

    def loss(q, k, v, segments, cap):
        y = attention.dot_product_attention(q, k, v, MaskSpec(True, segments, segments), scale=0.1, cap=cap)
        return jnp.sum(y.astype(jnp.float32))

    found = {}
    with jax.set_mesh(mesh):
        for name, ids, cap in (("causal", None, 0.0), ("packed", segments, 0.0), ("capped", segments, 30.0)):
            program = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=4)
            found[name] = report(program.lower(q, k, k, ids, cap).compile())
    return found


def attention_kind(name):
    """Compiles a layer of an attention kind, forward and backward, for one TPU."""
    mesh, kind = tpu_mesh(1, 1, 1, 1), KINDS[name]
    here = NamedSharding(mesh, PartitionSpec())
    on_chip = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
    tokens = on_chip(jax.ShapeDtypeStruct((2, LENGTH), jnp.int32))
    family = {} if kind.causal else {"family": "encoder", "head": "none"}
    sizes = {"layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 128, "attention": name}
    cfg = dataclasses.replace(CFG, **sizes, **family)
    model, params = Model(cfg, Compute(dtype="bfloat16")), jax.tree.map(on_chip, abstract(cfg)[0])
    packed = {"segment_ids": tokens} if kind.packed else {}

    def loss(params, tokens, packed):
        return jnp.sum(model.features(params, tokens, **packed)[0].astype(jnp.float32))

    with jax.set_mesh(mesh):
        return report(jax.jit(jax.grad(loss)).lower(params, tokens, packed).compile())


def fused_for_cuda(length):
    """Lowers packed rows, forward and backward; what jax asks of the driver is answered as an H100 would."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    cudnn.check_cudnn_version = lambda: 91000
    cudnn.check_compute_capability = lambda _: True
    cudnn.is_cuda_compute_capability_equal = lambda _: False
    attention.target_platform = lambda: "gpu"
    q = jax.ShapeDtypeStruct((2, int(length), 4, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, int(length)), jnp.int32)

    def loss(q, k, v, ids):
        return jnp.sum(attention.fused(q, k, v, MaskSpec(True, ids, ids), scale=0.1).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, q, q, ids).lower(lowering_platforms=("cuda",)).as_text()
    return {"kernels": lowered.count("@__cudnn$fmha"), "products": lowered.count("dot_general")}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
