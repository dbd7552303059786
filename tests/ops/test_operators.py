"""Operators: one equation for each when somebody asks for names, and nothing at all otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.ops import operators
from fastlm.ops.caches import keys_and_values
from fastlm.ops.contract import contract
from fastlm.ops.masks import MaskSpec
from fastlm.ops.normalization import rms_norm
from fastlm.ops.operators import Slot, operator

X, W = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 4)


def equations(function, *arrays):
    with operators.named():
        return jax.make_jaxpr(function)(*arrays).jaxpr.eqns


def test_calls_are_single_equations_with_their_arguments():
    (equation,) = equations(lambda x, w: contract(x, w, dtype=jnp.float32), X, W)
    call = equation.params["call"]
    assert call.name == "contract"
    assert call.arguments == {"w": Slot(0), "x": Slot(1), "transpose": False, "dtype": jnp.float32}


def test_outside_they_change_nothing():
    function = lambda x, w: rms_norm(contract(x, w), None, 1e-6)
    names = {equation.primitive.name for equation in jax.make_jaxpr(function)(X, W).jaxpr.eqns}
    assert operators.primitive.name not in names


def test_arrays_in_trees_have_slots_and_static_fields_stay():
    @operator
    def looked(mask: MaskSpec, keys: int) -> jax.Array:
        return mask.dense(2, keys)

    (equation,) = equations(lambda offset: looked(MaskSpec(offset=offset), 3), jnp.array([1]))
    told = equation.params["call"].arguments
    assert told["mask"] == MaskSpec(offset=Slot(0))
    assert told["keys"] == 3


def test_a_named_trace_computes_the_same():
    empty = keys_and_values(2, 4, 1, 3, jnp.float32)
    write = lambda k: empty.write(k, k, jnp.array([0, 2]))
    k = jnp.arange(6.0).reshape(2, 1, 1, 3)
    with operators.named():
        named = jax.make_jaxpr(write)(k)
    assert operators.primitive.name in {equation.primitive.name for equation in named.jaxpr.eqns}
    for found in (jax.extend.core.jaxpr_as_fun(named)(k), jax.jit(jax.extend.core.jaxpr_as_fun(named))(k)):
        for one, other in zip(found, jax.tree.leaves(write(k)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_operators_inside_operators_stay_inside():
    @operator
    def twice(x: jax.Array, w: jax.Array) -> jax.Array:
        return contract(contract(x, w), w, transpose=True)

    found = equations(twice, X, W)
    assert [equation.params["call"].name.rpartition(".")[2] for equation in found] == ["twice"]


def test_naming_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), operators.named():
        1 / 0  # noqa: B018
    assert operators.primitive.name not in str(jax.make_jaxpr(contract)(X, W))
