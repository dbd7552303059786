"""Parts of a model: layers as if run by hand, units whose absence no output can tell, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, fusion, slicing, units
from fastlm.models.units import HIDDEN, Kept
from fastlm.ops.leaves import Rounded
from fastlm.ops.masks import MaskSpec
from fastlm.ops.paths import flatten, map_with_path
from tests.models.random_weights import drawn


def variant(cfg, **changes):
    return dataclasses.replace(cfg, **changes)


GPT = ModelConfig(
    vocab_size=13,
    max_length=12,
    layers=2,
    width=16,
    heads=4,
    positions="learned",
    bias=True,
    tied_embeddings=False,
    head_bias=True,
    init_scale=0.4,
    residual_init="same",
)
LLAMA = variant(
    GPT,
    positions="rotary",
    bias=False,
    tied_embeddings=True,
    head_bias=False,
    kv_heads=2,
    norm="rms_norm",
    feed_forward="swiglu",
    feed_forward_width=24,
)
BERT = variant(
    GPT,
    family="encoder",
    head="masked_language_model",
    tied_embeddings=True,
    norm_place="post",
    token_types=2,
    embedding_norm=True,
)
MODELS = {
    "gpt": GPT,
    "llama": variant(LLAMA, qk_norm=True),
    "one_group": variant(LLAMA, kv_heads=1, qkv_bias=True),
    "bert": BERT,
    "classifier": variant(BERT, head="sequence", classes=3, pooler="tanh"),
    "t5": variant(LLAMA, family="encoder_decoder", encoder_layers=2, positions="relative", feed_forward="geglu"),
    "mixed": variant(LLAMA, attention=("gated_delta", "latent(query_rank=8)")),
    "mixed_too": variant(LLAMA, attention=("gated_linear", "lsh")),
    "transformer_xl": variant(LLAMA, attention="transformer_xl(memory=4)"),
}


def some(*names):
    """All models that this file has, those that are not named only where the slow tests run."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


HEADS = {2: ((2, 3), (0, 3)), 4: ((1, 3), (0, 1, 2)), 1: ((1, 3), (0, 1, 2))}  # kv heads -> what to keep, by layer
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 9), dtype=np.int32)


def run(cfg, params):
    source = {"source": TOKENS[:, :5]} if cfg.encoder_layers else {}
    return jax.jit(lambda params: Model(cfg).apply(params, TOKENS, **source)[0])(params)


def zeroed(cfg, params, path_ends, dropped):
    """Zeroes the entries of the units `dropped` (unit -> numbers) in the weights whose paths end so."""

    def zero(path, leaf):
        for axis, unit in enumerate(units.axes(cfg)[path]):
            if path.endswith(path_ends) and unit in dropped:
                mask = np.ones(units.counts(cfg)[unit])
                mask[list(dropped[unit])] = 0
                mask = np.repeat(mask, leaf.shape[axis] // len(mask))
                leaf = leaf * mask.reshape([-1 if other == axis else 1 for other in range(leaf.ndim)])
        return np.float32(leaf)

    return map_with_path(zero, params)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())


# --- layers ------------------------------------------------------------------------------------------


@given(st.integers(1, 40).flatmap(lambda of: st.tuples(st.integers(1, of), st.just(of))))
def test_layers_are_spread_evenly(sizes):
    count, of = sizes
    found = slicing.evenly(count, of)
    assert len(set(found)) == count and list(found) == sorted(found)
    gaps = np.diff(found)
    assert count == 1 or (found[0] == 0 and found[-1] == of - 1 and gaps.max() - gaps.min() <= 1)
    assert count < of or found == tuple(range(of))


def test_distilbert_took_the_same():
    assert slicing.evenly(6, 12) == (0, 2, 4, 7, 9, 11)
    with pytest.raises(UserError, match="7 of 6 layers cannot be kept; keep between 1 and 6"):
        slicing.evenly(7, 6)


DEEP = variant(
    LLAMA,
    layers=5,
    attention=("full", "local(window=3)"),
    feed_forward=("swiglu", "swiglu", "gelu"),
    heads=(4, 4, 2, 4, 2),
    feed_forward_width=(24, 8, 24, 8, 24),
    head_dim=(4, 4, 8, 4, 8),
    kv_heads=2,
)


@pytest.fixture(scope="module")
def deep():
    return drawn(DEEP)


@settings(max_examples=8)
@given(st.sets(st.integers(0, 4), min_size=1))
def test_kept_layers_are_those_blocks_one_after_the_other(deep, chosen):
    layers = sorted(chosen)
    cfg, params = slicing.keep_layers(DEEP, deep, layers)
    model, positions = Model(DEEP), jnp.broadcast_to(jnp.arange(9), (2, 9))
    x = model.embed(deep, TOKENS, positions)
    for i in layers:
        x, *_ = model.block(deep, i, x, positions=positions, mask=MaskSpec(True), bias=None, cache=None, rng=None)
    np.testing.assert_array_equal(Model(cfg).features(params, TOKENS)[0], model.final_norm(deep, x))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract(cfg)[0])


def test_patterns_and_sizes_follow_the_layers():
    cfg = slicing.of_layers(DEEP, (0, 2, 4))
    assert (cfg.attention, cfg.feed_forward, cfg.heads) == ("full", ("swiglu", "gelu"), (4, 2, 2))
    assert (cfg.feed_forward_width, cfg.kv_heads, cfg.layers) == (24, 2, 3)
    cfg = slicing.of_layers(variant(DEEP, attention=("full", "local(window=3)", "local(window=3)")), (0, 1, 3, 4))
    assert cfg.attention == ("full", "local(window=3)")


def test_a_layer_that_writes_nothing_can_go_in_both_stacks():
    cfg = MODELS["t5"]
    params = drawn(cfg)
    silent = lambda path: path.startswith(("layers/0/", "layers/3/")) and path.endswith(("out", "down"))
    params = map_with_path(lambda path, leaf: leaf * 0 if silent(path) else leaf, params)
    small, kept = slicing.keep_layers(cfg, params, (1, 2))
    assert (small.encoder_layers, small.layers) == (1, 1)
    np.testing.assert_array_equal(run(small, kept), run(cfg, params))


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("gpt", (), r"layers \(none\): give ascending numbers from 0 to 1, each once, at least one"),
        ("gpt", (1, 0), "layers 1, 0: give ascending"),
        ("gpt", (0, 2), "layers 0, 2: give ascending"),
        ("t5", (2, 3), "layers 2, 3 leave a stack empty: 0 to 1 are the encoder's, 2 to 3 the decoder's"),
    ],
)
def test_layers_that_are_not_there(name, layers, message):
    with pytest.raises(UserError, match=message) as caught:
        slicing.of_layers(MODELS[name], layers)
    assert "\n" not in str(caught.value)


# --- width -------------------------------------------------------------------------------------------


def kept_of(cfg):
    """Some heads and feed-forward units of every layer, and what goes."""
    alike = cfg.positions == "relative"
    heads = {i: HEADS[cfg.layer(i).kv_heads][0 if alike else i % 2] for i in range(cfg.total_layers)}
    cross = {i: tuple(3 - n for n in reversed(heads[i])) for i in heads if cfg.layer(i).cross}
    width = cfg.layer(0).feed_forward_width
    units_of = {i: tuple(n for n in range(width) if (n + i) % 3) for i in range(cfg.total_layers)}
    kept = Kept(heads=heads, cross_heads=cross, feed_forward=units_of)
    dropped = {unit: set(range(units.counts(cfg)[unit])) - set(own) for unit, own in units.chosen(cfg, kept).items()}
    return kept, dropped


@pytest.mark.parametrize("name", some("gpt", "llama", "bert", "t5", "mixed", "transformer_xl"))
def test_units_that_nobody_reads_can_go(name):
    cfg = MODELS[name]
    kept, dropped = kept_of(cfg)
    params = zeroed(cfg, drawn(cfg), ("/out", "/down"), dropped)
    small, sliced = slicing.keep_width(cfg, params, kept)
    assert small.layer(0).heads == len(kept.heads[0]) and small.layer(1).feed_forward_width == len(kept.feed_forward[1])
    assert small.layer(0).head_dim == cfg.layer(0).head_dim
    assert jax.tree.map(np.shape, sliced) == jax.tree.map(lambda leaf: leaf.shape, abstract(small)[0])
    close(run(small, sliced), run(cfg, params))


@pytest.mark.parametrize("name", [pytest.param("one_group", marks=pytest.mark.slow), "t5", "post"])
def test_hidden_units_that_are_zero_can_go_under_rms_norm(name):
    cfg = variant(BERT, norm="rms_norm") if name == "post" else MODELS[name]
    hidden = (0, 1, 3, 4, 7, 8, 9, 11, 12, 15)
    params = zeroed(cfg, drawn(cfg), "", {HIDDEN: set(range(16)) - set(hidden)})
    small, sliced = slicing.keep_width(cfg, params, Kept(hidden), rescale_norms=True)
    assert small.width == 10 and small.layer(0).head_dim == 4 and small.norm_epsilon == pytest.approx(1.6e-5)
    close(run(small, sliced), run(cfg, params))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "transformer_xl"])
def test_everything_can_be_narrower(name):
    cfg, params = MODELS[name], drawn(MODELS[name])
    small, sliced = slicing.keep_width(cfg, params, Kept(range(1, 16, 2)))
    assert jax.tree.map(np.shape, sliced) == jax.tree.map(lambda leaf: leaf.shape, abstract(small)[0])
    np.testing.assert_array_equal(sliced["embedding"]["table"], params["embedding"]["table"][:, 1::2])
    assert small.layer(0).feed_forward_width == cfg.layer(0).feed_forward_width, "not derived from the new width"
    assert small.layer(0).attention_scale == cfg.layer(0).attention_scale


@pytest.mark.parametrize("name", MODELS)
def test_choosing_everything_is_the_identity(name):
    cfg, params = MODELS[name], jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract(MODELS[name])[0])
    every, layers = lambda count: range(count), range(cfg.total_layers)
    heads = {i: every(4) for i in layers}
    cross = {i: every(4) for i in layers if cfg.layer(i).cross}
    widths = {i: every(cfg.layer(i).feed_forward_width) for i in layers}
    for small, kept in (
        slicing.keep_layers(cfg, params, layers),
        slicing.keep_width(cfg, params, Kept(every(16), heads, cross, widths), rescale_norms=True),
    ):
        assert small == cfg
        assert all(leaf is flatten(params)[path] for path, leaf in flatten(kept).items())


def test_what_is_inside_of_heads_and_latents_is_no_hidden_unit():
    """Even where both are as wide as the stream."""
    cfg = variant(LLAMA, heads=1, kv_heads=1, qk_norm=False, attention="latent(rank=16)")
    small, params = slicing.keep_width(cfg, drawn(cfg), Kept(hidden=range(8)))
    assert params["layers"]["0"]["attention"]["k"].shape == (16, 16)
    cfg = variant(LLAMA, heads=1, kv_heads=1, qk_norm=True)
    small, params = slicing.keep_width(cfg, drawn(cfg), Kept(hidden=range(8)))
    assert params["layers"]["0"]["attention"]["q_norm"]["scale"].shape == (16,)
    assert small.layer(0).head_dim == 16


BOTH_WAYS = variant(LLAMA, family="encoder", head="none", attention="gated_linear", kv_heads=4)


def test_heads_that_read_both_ways_keep_their_direction():
    params = drawn(BOTH_WAYS)
    kept = Kept(heads=dict.fromkeys(range(2), (1, 2)))
    params = zeroed(BOTH_WAYS, params, "/out", {units.heads(i): (0, 3) for i in range(2)})
    small, sliced = slicing.keep_width(BOTH_WAYS, params, kept)
    features = lambda cfg, params: jax.jit(lambda params: Model(cfg).features(params, TOKENS)[0])(params)
    close(features(small, sliced), features(BOTH_WAYS, params))
    with pytest.raises(UserError, match="'gated_linear' reads forwards, the second backwards; keep as many of each"):
        slicing.keep_width(BOTH_WAYS, params, Kept(heads={0: (0, 1)}))


NARROW = Kept(hidden=range(8))


@pytest.mark.parametrize(
    ("cfg", "kept", "message"),
    [
        (
            MODELS["transformer_xl"],
            NARROW,
            "layers/0/attention/distance .*transformer_xl.* cannot be sliced: it would be",
        ),
        (variant(GPT, positions="sinusoidal"), NARROW, "'sinusoidal': .* hidden units cannot be cut"),
        (variant(GPT, positions="alibi"), Kept(heads={0: (0, 1)}), "'alibi': .* heads cannot be cut"),
        (variant(LLAMA, fused=True), NARROW, "fused products cannot be sliced; slice it first"),
        (GPT, Kept(hidden=(3, 16)), "hidden units 3, 16: give ascending numbers from 0 to 15"),
        (GPT, Kept(feed_forward={1: (2, 2)}), "feed-forward units of layer 1 2, 2: give ascending"),
        (GPT, Kept(heads={2: (0,)}), "heads of layer 2: the model has none there; its layers are 0 to 1"),
        (GPT, Kept(cross_heads={0: (0,)}), "cross_heads of layer 0: the model has none there"),
        (LLAMA, Kept(heads={0: (0, 1, 2)}), r"unequally many of the groups that share a key \(2, 1\)"),
        (
            MODELS["t5"],
            Kept(heads=dict.fromkeys(range(4), (0, 1))),
            "2 heads of self-attention and 4 of cross-attention",
        ),
        (MODELS["t5"], Kept(heads={0: (0, 1)}), "layers of a stack share one table; keep the same in all"),
    ],
)
def test_what_cannot_be_sliced_is_refused_by_name(cfg, kept, message):
    with pytest.raises(UserError, match=message) as caught:
        slicing.keep_width(cfg, abstract(cfg)[0], kept)
    assert "\n" not in str(caught.value)


def test_weights_in_other_forms_are_refused_by_name():
    params = drawn(LLAMA)
    rounded = {"table": Rounded.of(jnp.asarray(params["embedding"]["table"]), table=True)}
    with pytest.raises(UserError, match="embedding/table: a weight stored as Rounded cannot be sliced; take the plain"):
        slicing.keep_width(LLAMA, {**params, "embedding": rounded}, NARROW)
    with pytest.raises(UserError, match="rescale_norms: 'layer_norm' takes the mean away"):
        slicing.keep_width(GPT, drawn(GPT), NARROW, rescale_norms=True)
    cfg, fused = fusion.fuse(LLAMA, params)
    assert slicing.keep_layers(cfg, fused, (1,))[1]["layers"]["0"] is fused["layers"]["1"], "layers may be fused"
