"""Meshes and rules: what divides, what is dropped, what collides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract
from fastlm.parallel import mesh as meshes
from fastlm.parallel import rules


def test_minus_one_takes_what_is_left():
    assert dict(meshes.make(data=-1, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 1}, "needs 3 devices but there are 8"),
        ({"data": -1, "fsdp": 3}, "3 does not divide the 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "sizes are positive"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        meshes.make(**sizes)


def test_weights_and_batches_are_placed_by_name():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    assert rules.partition_spec(("embed", "mlp"), (32, 64), mesh) == P(("fsdp",), ("tensor",))
    assert rules.partition_spec(("batch", "length", "hidden"), (8, 4, 2), mesh) == P(("data", "fsdp"), None, None)
    assert rules.partition_spec(("embed", "mlp"), (33, 64), mesh) == P(None, ("tensor",))


def test_two_names_on_one_mesh_axis_are_refused():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match="already taken"):
        rules.partition_spec(("heads", "mlp"), (32, 64), mesh)
    with pytest.raises(KeyError):
        rules.partition_spec(("heds",), (32,), mesh)


def test_optimizer_state_lies_where_its_parameter_lies():
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    state = {"mu": {"model": {"a": {"w": jnp.zeros((4, 8))}}}, "count": jnp.zeros(())}
    placed = rules.shardings(state, {"model/a/w": ("embed", "mlp")}, mesh)
    assert placed["mu"]["model"]["a"]["w"].spec == P(("fsdp",), ("tensor",))
    assert placed["count"].spec == P()


def test_constrain_without_a_mesh_is_nothing():
    x = jnp.ones((2, 2))
    assert rules.constrain(x, ("batch", "hidden")) is x


def test_constrain_shards_inside_jit(no_mesh):
    jax.set_mesh(meshes.make(data=8))
    y = jax.jit(lambda x: rules.constrain(x * 2, ("batch", "hidden")))(jnp.ones((16, 2)))
    assert y.sharding.spec[0] in ("data", ("data",), ("data", "fsdp"))


@pytest.mark.parametrize(
    "head",
    [
        {"head": "masked_language_model"},
        {"head": "masked_language_model", "tied_embeddings": False},
        {"head": "sequence", "classes": 4, "pooler": "tanh"},
    ],
    ids=["masked", "untied", "pooled"],
)
def test_heads_that_stack_two_matrices_have_the_same_gradients_on_any_mesh(head):
    """XLA's partitioner gets them wrong if the first is cut along its output; see `models.heads`."""
    cfg = ModelConfig(family="encoder", vocab_size=24, layers=1, width=32, heads=4, max_length=16, **head)
    model, x = Model(cfg), jax.random.normal(jax.random.key(1), (64, 32))
    params = jax.jit(model.init)(jax.random.key(0))
    loss = lambda params, x: jnp.sum(model.head(params, x) ** 2)
    alone = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, rules.shardings(params, abstract(cfg)[1], mesh))
    rows = jax.device_put(x, NamedSharding(mesh, rules.partition_spec(("batch", None), x.shape, mesh)))
    with jax.set_mesh(mesh):
        together = jax.jit(jax.grad(loss, (0, 1)))(placed, rows)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-4)
