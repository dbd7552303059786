"""What the kinds with a gated state do beyond the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models import attention as kinds
from fastlm.ops.masks import MaskSpec
from tests.models.attention import bench, oracles
from tests.models.attention.cases import CASES

CHOSEN = {case.spec: case for case in CASES if case.spec.startswith("gated_")}


@pytest.mark.parametrize("name", ["gated_linear", "gated_delta"])
def test_an_encoder_needs_two_equal_groups_of_heads(name):
    model = {"family": "encoder", "head": "none", "vocab_size": 11, "layers": 1, "width": 12, "attention": name}
    with pytest.raises(UserError, match=f"config.model.attention: '{name}' in an encoder reads with half"):
        Model(ModelConfig(**model, heads=3))
    Model(ModelConfig(**model | {"family": "decoder"}, heads=3))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("gated_linear(rank=0)", "rank must be at least 1"),
        ("gated_linear(temperature=0)", "temperature positive"),
        ("gated_delta(conv=1)", "conv must be 0"),
        ("gated_delta(conv=-2)", "conv must be 0"),
    ],
)
def test_options_that_cannot_be_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        kinds.options(spec)


@pytest.mark.parametrize(
    "spec, name",
    [("gated_linear(rank=3)", "decay_bias"), pytest.param("gated_delta", "decay_log", marks=pytest.mark.slow)],
)
def test_gates_that_are_open_or_shut_stay_finite(spec, name):
    case = CHOSEN[spec]
    cfg, params = bench.layer(case, True), bench.params_of(case)
    x, positions = bench.inputs(40), jnp.zeros((2, 40), jnp.int32)
    look = {"positions": positions, "mask": MaskSpec()}
    loss = lambda p, x: jnp.sum(bench.module(case, cfg).apply({"params": p}, x, x, **look)[0] ** 2)
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for value in (-80.0, 80.0):
        for leaf in jax.tree.leaves(run(params | {name: jnp.full_like(params[name], value)}, x)):
            assert np.isfinite(leaf).all()


def test_later_tokens_and_other_documents_change_nothing_through_the_convolution():
    case = CHOSEN["gated_delta"]
    cfg, params = bench.layer(case, True), bench.params_of(case)
    x, segments = bench.inputs(12), np.array([[1] * 5 + [2] * 7] * 2, np.int32)
    look = {"positions": jnp.zeros((2, 12), jnp.int32), "mask": bench.mask_of(True, segments)}
    run = jax.jit(lambda x: bench.module(case, cfg).apply({"params": params}, x, x, **look)[0])
    y, other = run(x), run(x.at[:, :5].set(9.0).at[:, 8:].set(-9.0))
    np.testing.assert_allclose(y[:, 5:8], other[:, 5:8], atol=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["decoder", "encoder"])
def test_without_convolution_heads_of_their_own_keys_equal_the_oracle(causal):
    layer = {"kv_heads": 2, "qk_norm": False}
    case = bench.Case("gated_delta(conv=0)", oracles.gated_delta, layer, oracles.normalized_and_gated)
    cfg, params = bench.layer(case, causal), bench.params_of(case, causal)
    mask, positions = bench.mask_of(causal, bench.PACKED), jnp.asarray(bench.positions_of(bench.PACKED))

    @jax.jit
    def both(x):
        look = {"positions": positions, "mask": mask}
        y = bench.module(case, cfg).apply({"params": params}, x, x, **look)[0]
        return y, bench.expected(case, cfg, params, x, x, mask, positions)

    y, want = both(bench.inputs(15))
    np.testing.assert_allclose(y[bench.PACKED != 0], want[bench.PACKED != 0], atol=case.tolerance)
