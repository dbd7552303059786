"""In bfloat16 no matrix product of a training step silently becomes a float32 one on CPU (half the speed)."""

import re

import jax
import jax.numpy as jnp
import pytest

from fastlm.models import Compute, Model, ModelConfig
from fastlm.tasks import language_modeling


def operand_types(program: str) -> list[tuple[str, ...]]:
    """Types of the operands of every product in an optimized program."""
    types = dict(re.findall(r"(%[\w.\-]+) = (\w+)\[", program))
    found = []
    for line in program.splitlines():
        if " dot(" in line:
            operands = re.findall(r"%[\w.\-]+", line.split(" dot(")[1].split(")")[0])
            found.append(tuple(types[name] for name in operands))
    return found


@pytest.mark.parametrize(
    "changes", [{"bias": True}, {"feed_forward": "swiglu", "kv_heads": 2, "tied_embeddings": False}]
)
def test_products_keep_bfloat16_operands(changes):
    cfg = ModelConfig(vocab_size=512, max_length=64, layers=1, width=64, heads=4, **changes)
    model = Model(cfg, Compute(dtype="bfloat16"))
    task = language_modeling.make(model, jnp.ones(512))
    params = jax.eval_shape(lambda: {"model": model.init(jax.random.key(0))})
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    batch = {"tokens": ids, "targets": ids, "loss_mask": jax.ShapeDtypeStruct((4, 64), jnp.float32)}
    loss = lambda p, b: task.loss(p, task.constants, (), b, 0, None)[0]
    program = jax.jit(jax.grad(loss)).lower(params, batch).compile().as_text()
    found = operand_types(program)
    assert len(found) >= 3 * 7, "the products were not found in the program"
    assert [types for types in found if "f32" in types] == []
