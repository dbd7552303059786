"""The contract of attention kinds, run on every entry of `KINDS`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract
from fastlm.models import attention as kinds
from fastlm.ops.leaves import Adapted
from fastlm.ops.masks import MaskSpec
from fastlm.parallel import mesh as meshes
from fastlm.parallel import rules
from tests.models.attention import bench
from tests.models.attention.bench import PACKED, PADDED
from tests.models.attention.cases import CASES

SOFTMAXES = ("exp2", "top_k(k=2)", "threshold(margin=1.5)", "threshold(mass=0.3)")


def every(*flags):
    """Parametrizes over the cases whose kind has all flags; the further cases of a kind are slow tests."""
    chosen, seen = [], set()
    for case in CASES:
        if all(getattr(case.kind, flag) for flag in flags):
            name = case.spec.partition("(")[0]
            chosen.append(pytest.param(case, marks=[pytest.mark.slow] if name in seen else [], id=case.spec))
            seen.add(name)
    return pytest.mark.parametrize("case", chosen)


def test_every_kind_is_tested():
    assert {kinds.configuration.call(case.spec, "")[0] for case in CASES} == set(kinds.KINDS)


def compare_with_oracle(case, causal, segments, length=15, context=None, **changes):
    cfg, params = bench.layer(case, causal, **changes), bench.params_of(case, causal)
    mask = bench.mask_of(causal, segments)
    if segments is None:
        positions, real = jnp.broadcast_to(jnp.arange(length), (2, length)), np.ones((2, length), bool)
    else:
        positions, real = jnp.asarray(bench.positions_of(segments)), segments != 0
    weight = jax.random.normal(jax.random.key(9), (2, length, bench.WIDTH)) * real[..., None]

    def fast(params, x):
        look = {"positions": positions, "mask": mask}
        y, _, aux = bench.module(case, cfg, ("attention", "qkv")).apply({"params": params}, x, x, **look)
        return jnp.sum(y * weight), (y, aux)

    def slow(params, x):
        y = bench.expected(case, cfg, params, x, x, mask, positions)
        return jnp.sum(y * weight), y

    @jax.jit
    def both(params, x):
        grad = lambda f: jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, x)
        return grad(fast), grad(slow)

    x = bench.inputs(length)
    ((_, (y, aux)), gradients), ((_, expected), oracle_gradients) = both(params, x)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[real], expected[real], atol=case.tolerance)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(oracle_gradients))
    for path, got in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        want = dict(jax.tree_util.tree_flatten_with_path(oracle_gradients)[0])[path]
        np.testing.assert_allclose(got, want, atol=case.tolerance * max(scale, 1), err_msg=jax.tree_util.keystr(path))
    return y, aux, params, real


@every("causal", "packed")
def test_packed_documents_of_a_decoder_equal_the_oracle_with_gradients_and_map(case):
    y, aux, params, real = compare_with_oracle(case, True, PACKED)
    # The map that `capture` gives is what the values were really weighted with.
    value = jnp.repeat(aux["qkv"][2], bench.HEADS // aux["qkv"][2].shape[2], axis=2)
    heads = jnp.einsum("BNTS,BSNH->BTNH", aux["attention"], value)
    again = bench.output(case, bench.layer(case, True), params, bench.inputs(15), heads)
    np.testing.assert_allclose(again[real], y[real], atol=1e-4)


@every("bidirectional")
def test_padded_rows_of_an_encoder_equal_the_oracle_with_gradients(case):
    compare_with_oracle(case, False, PADDED)


@pytest.mark.slow
@every("bidirectional", "packed")
def test_packed_documents_of_an_encoder_equal_the_oracle(case):
    compare_with_oracle(case, False, PACKED)


@pytest.mark.slow
@every("causal")
@pytest.mark.parametrize("length", [1, 2, 15, 32])
def test_rows_of_one_document_equal_the_oracle(case, length):
    compare_with_oracle(case, True, None, length)


@pytest.mark.slow
@every("softmax")
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_any_softmax_goes_into_any_kind_that_has_one(case, softmax):
    loose = dataclasses.replace(case, tolerance=1e-3) if softmax == "exp2" else case
    causal = case.kind.causal
    compare_with_oracle(loose, causal, PACKED if case.kind.packed else PADDED, softmax=softmax)


@every("decode")
def test_step_by_step_from_ragged_prompts_equals_all_at_once(case):
    cfg, params = bench.layer(case, True), bench.params_of(case)
    layer, x, prompts = bench.module(case, cfg), bench.inputs(12), np.array([5, 2])
    at = lambda start, count: start[:, None] + jnp.arange(count)

    @jax.jit
    def run(x, positions, cache, **mask):
        y, cache, _ = layer.apply({"params": params}, x, x, positions=positions, cache=cache, mask=MaskSpec(**mask))
        return y, cache

    zero = jnp.zeros((2,), jnp.int32)
    alone = jax.jit(lambda x: layer.apply({"params": params}, x, x, positions=at(zero, 12), mask=MaskSpec())[0])
    whole = alone(x)
    cache = kinds.empty_cache(case.spec, cfg, 2, 12, jnp.float32)
    garbage = jnp.where(jnp.arange(5)[:, None] < prompts[:, None, None], x[:, :5], 50.0)
    written = []
    for places in ({"offset": zero}, {}):  # read behind what may be there, and into a cache known to be empty
        y, into = run(garbage, at(zero, 5), cache, lengths=jnp.asarray(prompts), **places)
        for row, length in enumerate(prompts):
            np.testing.assert_allclose(y[row, :length], whole[row, :length], atol=case.tolerance)
        written.append(into)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=case.tolerance), *written)
    cache = written[-1]
    for step in range(7):
        place = jnp.asarray(prompts + step)
        token = jnp.take_along_axis(x, place[:, None, None], axis=1)
        y, cache = run(token, place[:, None], cache, offset=place)
        want = jnp.take_along_axis(whole, place[:, None, None], axis=1)
        np.testing.assert_allclose(y, want, atol=case.tolerance)


@every("carry")
def test_a_row_goes_on_where_the_row_before_it_ended(case):
    """Two batches whose rows hold parts of documents give what each document gives in one piece."""
    cfg, params = bench.layer(case, True), bench.params_of(case)
    layer, x = bench.module(case, cfg), bench.inputs(16)
    segments = np.array([[1] * 3 + [2] * 8 + [3] * 5, [1] * 16], np.int32)
    positions = jnp.asarray(bench.positions_of(segments))

    @jax.jit
    def run(x, positions, segments, cache):
        mask = MaskSpec(True, segments, segments, jnp.zeros((2,), jnp.int32))
        return layer.apply({"params": params}, x, x, positions=positions, mask=mask, cache=cache)[:2]

    whole, _ = run(x, positions, jnp.asarray(segments), kinds.empty_cache(case.spec, cfg, 2, 16, jnp.float32))
    cache = kinds.empty_cache(case.spec, cfg, 2, 16, jnp.float32)
    parts = []
    for part in (slice(0, 8), slice(8, 16)):
        # Each row numbers its documents from 1, as the pipeline does.
        own = segments[:, part] - segments[:, part][:, :1] + 1
        y, cache = run(x[:, part], positions[:, part], jnp.asarray(own), cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=case.tolerance)


@every("cross")
def test_looking_at_another_sequence_equals_the_oracle_and_its_cache(case):
    cfg = dataclasses.replace(bench.layer(case, True), rotary=False, cross=True)
    params, layer = bench.params_of(case), bench.module(case, cfg)
    x, source = bench.inputs(6), bench.inputs(9, seed=5)
    there = np.array([[1] * 9, [1] * 4 + [0] * 5], np.int32)
    mask = MaskSpec(False, jnp.ones((2, 6), jnp.int32), jnp.asarray(there))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))

    @jax.jit
    def run(x, source, cache, mask):
        look = {"positions": positions[:, : x.shape[1]], "mask": mask, "cache": cache}
        return layer.apply({"params": params}, x, source, **look)[:2]

    want = jax.jit(lambda x, source: bench.expected(case, cfg, params, x, source, mask, positions))(x, source)
    np.testing.assert_allclose(run(x, source, None, mask)[0], want, atol=case.tolerance)
    if not case.kind.decode:
        return
    one = MaskSpec(False, jnp.ones((2, 1), jnp.int32), jnp.asarray(there))
    cache = kinds.empty_cache(case.spec, cfg, 2, 9, jnp.float32)
    first, cache = run(x[:, :1], source, cache, one)
    second, _ = run(x[:, 1:2], None, cache, one)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), want[:, :2], atol=case.tolerance)


@every("cross", "decode")
def test_a_model_that_looks_at_a_source_this_way_writes_step_by_step_what_it_scores_at_once(case):
    """Also with rotary positions, which cross-attention does without."""
    cfg = ModelConfig(
        family="encoder_decoder",
        encoder_layers=1,
        layers=1,
        vocab_size=11,
        width=16,
        heads=2,
        cross_attention=case.spec,
        residual_init="same",
        init_scale=0.3,
    )
    model = Model(cfg)
    params = jax.jit(model.init)(jax.random.key(0))
    source, tokens = jnp.array([[1, 2, 3, 4, 5]]), jnp.array([[6, 7, 8]])

    @jax.jit
    def both(params):
        memory, _ = model.encode(params, source)
        whole, _ = model.features(params, tokens, memory=memory)
        found, cache = [], model.empty_cache(1, 3, source.shape[1])
        for i in range(3):
            hidden, aux = model.features(params, tokens[:, i : i + 1], memory=None if i else memory, cache=cache)
            found, cache = [*found, hidden], aux["cache"]
        return whole, jnp.concatenate(found, 1)

    np.testing.assert_allclose(*both(params), atol=1e-5)


@every()
def test_every_matrix_may_be_a_leaf(case):
    cfg, params = bench.layer(case, case.kind.causal), bench.params_of(case, case.kind.causal)
    x = bench.inputs(15)
    look = {"positions": jnp.broadcast_to(jnp.arange(15), (2, 15)), "mask": bench.mask_of(case.kind.causal, PADDED)}
    thin = lambda leaf: Adapted(leaf, jnp.ones((leaf.shape[0], 1)), jnp.ones((1, leaf.shape[1])))
    adapted = jax.tree.map(lambda leaf: thin(leaf) if leaf.ndim == 2 else leaf, params)
    run = lambda params, x: bench.module(case, cfg).apply({"params": params}, x, x, **look)[0]
    assert jax.eval_shape(run, adapted, x).shape == x.shape


@pytest.mark.slow
@every()
def test_bfloat16_stays_near_float32(case):
    causal = case.kind.causal
    cfg, params = bench.layer(case, causal), bench.params_of(case, causal)
    x = bench.inputs(15)
    positions = jnp.broadcast_to(jnp.arange(15), (2, 15))
    look = {"positions": positions, "mask": bench.mask_of(causal, PADDED)}
    run = lambda dtype: jax.jit(
        lambda x: bench.module(case, cfg, dtype=dtype).apply({"params": params}, x, x, **look)[0]
    )
    exact, y = run("float32")(x), run("bfloat16")(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    difference = jnp.sqrt(jnp.mean((y.astype(jnp.float32) - exact)[PADDED != 0] ** 2))
    assert float(difference / jnp.std(exact)) < 0.03


@pytest.mark.slow
@every()
def test_a_row_of_padding_alone_is_finite_with_finite_gradients(case):
    causal = case.kind.causal
    cfg, params = bench.layer(case, causal), bench.params_of(case, causal)
    segments = np.array([[0] * 6, [1] * 6], np.int32)
    look = {"positions": jnp.zeros((2, 6), jnp.int32), "mask": bench.mask_of(causal, segments)}
    loss = lambda p, x: jnp.sum(bench.module(case, cfg).apply({"params": p}, x, x, **look)[0] ** 2)
    for value in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, bench.inputs(6))):
        assert np.isfinite(value).all()


NEEDS = {
    "causal": {"family": "decoder"},
    "bidirectional": {"family": "encoder", "head": "none"},
    "bias": {"positions": "alibi"},
    "softmax": {"softmax": "top_k"},
}


@pytest.mark.parametrize("name", list(kinds.KINDS))
def test_what_a_kind_cannot_do_is_an_error_while_building(name):
    kind = kinds.KINDS[name]
    base = {"vocab_size": 11, "layers": 1, "width": 16, "heads": 2, "attention": name}
    base |= {} if kind.causal else {"family": "encoder", "head": "none"}
    for need, change in NEEDS.items():
        if not getattr(kind, need):
            with pytest.raises(UserError, match=f"config.model.attention: kind '{name}' cannot"):
                Model(ModelConfig(**base | change))
    model = Model(ModelConfig(**base))
    tokens = jnp.zeros((1, 4), jnp.int32)
    if not kind.decode:
        with pytest.raises(UserError, match=f"kind '{name}' cannot run step by step"):
            model.empty_cache(1, 4)
    elif not kind.carry:
        with pytest.raises(UserError, match=f"kind '{name}' cannot go on from row to row"):
            model.features({}, tokens, segment_ids=tokens, cache=model.empty_cache(1, 4))
        with pytest.raises(UserError, match="a cache of 5 slots cannot hold 6 tokens"):
            model.features({}, tokens, cache=dataclasses.replace(model.empty_cache(1, 5), length=jnp.array([2])))
    with pytest.raises(UserError, match="rows of 0 tokens"):
        model.features({}, tokens[:, :0])
    if not kind.packed:
        with pytest.raises(UserError, match=f"kind '{name}' cannot keep the documents"):
            model.features({}, tokens, segment_ids=tokens)
    if not kind.cross:
        both = {"family": "encoder_decoder", "encoder_layers": 1, "cross_attention": name, "attention": "full"}
        with pytest.raises(UserError, match=f"config.model.cross_attention: kind '{name}' cannot look at another"):
            Model(ModelConfig(**base | both))


@pytest.mark.slow
@every()
def test_a_model_on_many_devices_learns_what_one_device_does(case):
    """Loss and gradients under a mesh that cuts rows, weights and heads are those without."""
    causal = case.kind.causal
    family = {} if causal else {"family": "encoder", "head": "masked_language_model"}
    values = {"heads": 4, "kv_heads": 2, "max_length": 32, "residual_init": "same"} | case.layer
    cfg = ModelConfig(vocab_size=24, layers=1, width=32, attention=case.spec, **values | {"kv_heads": 2}, **family)
    model = Model(cfg)
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 24)
    segments = jnp.array([[1] * 16, [1] * 9 + [0] * 7, [1] * 5 + [2] * 11, [1] * 16])
    if not case.kind.packed:
        segments = jnp.minimum(segments, 1)

    def loss(params, tokens, segments):
        options = {"segment_ids": segments, "packed": case.kind.packed}
        hidden, _ = model.features(params, tokens, **options)
        return jnp.sum(jnp.where(segments[..., None] > 0, model.head(params, hidden), 0) ** 2)

    params = jax.jit(model.init)(jax.random.key(0))
    alone = jax.jit(jax.value_and_grad(loss))(params, tokens, segments)
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, rules.shardings(params, abstract(cfg)[1], mesh))
    rows = NamedSharding(mesh, rules.partition_spec(("batch", None), tokens.shape, mesh))
    with jax.set_mesh(mesh):
        together = jax.jit(jax.value_and_grad(loss))(placed, *(jax.device_put(x, rows) for x in (tokens, segments)))
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(alone[1]))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5 * scale, rtol=2e-5)
