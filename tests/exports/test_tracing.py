"""Flat programs: whatever stays an operator, they compute what the program does."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend import core

from fastlm.exports import tracing
from fastlm.exports.programs import flat, programs
from fastlm.models import Compute, Model, ModelConfig
from fastlm.ops import operators

SIZES = {"b": 2, "t": 5, "c": 12}
MODELS = {
    "rotary": {"norm": "rms_norm", "feed_forward": "swiglu", "kv_heads": 1},
    "learned": {"positions": "learned", "norm": "layer_norm"},
    "alibi": {"positions": "alibi"},
    "states": {"attention": "linear"},
}


def names(jaxpr):
    kind = lambda equation: operators.primitive.name == equation.primitive.name
    return Counter(e.params["call"].name if kind(e) else e.primitive.name for e in jaxpr.eqns)


def given_to(program):
    rng = np.random.default_rng(0)
    shapes = {
        key: [size if isinstance(size, int) else SIZES[str(size)] for size in value.shape]
        for key, value in program.inputs.items()
    }
    make = lambda key, shape: rng.integers(1, 4, shape) if "cache" not in key else np.zeros(shape)
    return {key: jnp.asarray(make(key, shapes[key]), value.dtype) for key, value in program.inputs.items()}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    cfg = {"vocab_size": 16, "layers": 1, "width": 16, "heads": 2, "max_length": 16, "init_scale": 0.3}
    model = Model(ModelConfig(**cfg | MODELS[request.param]), Compute(dtype="float32", attention_form="plain"))
    return request.param, model, model.init(jax.random.key(0))


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_flat_programs_compute_what_programs_do(model, name):
    which, model, params = model
    program = programs(model, params, 5 if which == "states" else None)[name]
    shapes = (jax.eval_shape(lambda: flat(params)), program.inputs)
    given = (flat(params), given_to(program))
    run = lambda function: export.export(jax.jit(function))(*shapes).call(*given)
    wanted = jax.tree.leaves(run(program.call))
    for keeps in (lambda call, taken: True, lambda call, taken: False):
        closed = tracing.flatten(program.call, shapes, keeps)
        flattened = lambda weights, inputs, closed=closed: core.jaxpr_as_fun(closed)(
            *jax.tree.leaves((weights, inputs))
        )
        for found, value in zip(run(flattened), wanted, strict=True):
            np.testing.assert_allclose(found, value, atol=1e-6)


def test_attention_over_a_cache_is_one_operator_where_it_can_be(model):
    which, model, params = model
    program = programs(model, params, 5 if which == "states" else None)["decode"]
    shapes = (jax.eval_shape(lambda: flat(params)), program.inputs)
    found = names(tracing.flatten(program.call, shapes, lambda call, taken: True).jaxpr)
    assert found["cached_attention"] == (which in ("rotary", "learned"))
    # Of what an operator took over, nothing is left.
    if found["cached_attention"]:
        assert not found["rotate"] + found["rotary_angles"] + found["written"] + found["dot_product_attention"]
    opened = names(tracing.flatten(program.call, shapes, lambda call, taken: False).jaxpr)
    assert not {"contract", "cached_attention", "jit", "custom_vjp_call", "scan"} & opened.keys()
