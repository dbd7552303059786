"""Encoders and encoder-decoders on the one Transformer: who sees what, heads, positions, decoding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract
from fastlm.models.positions import relative_buckets, rotary_angles, sinusoidal
from fastlm.ops.paths import flatten

SMALL = ModelConfig(vocab_size=40, max_length=24, layers=2, width=32, heads=4, bias=True, init_scale=0.1)
BERT = dataclasses.replace(
    SMALL,
    family="encoder",
    norm_place="post",
    positions="learned",
    token_types=2,
    embedding_norm=True,
    feed_forward="gelu_exact",
    head="masked_language_model",
    head_bias=True,
)
MARIAN = dataclasses.replace(
    SMALL,
    family="encoder_decoder",
    encoder_layers=2,
    norm_place="post",
    positions="sinusoidal",
    feed_forward="silu",
    embedding_scale=32**0.5,
    head_bias=True,
)
T5 = dataclasses.replace(
    SMALL,
    family="encoder_decoder",
    encoder_layers=1,
    norm="rms_norm",
    positions="relative",
    relative_buckets=8,
    relative_distance=16,
    attention_scale=1.0,
    bias=False,
    feed_forward="geglu",
    tied_embeddings=False,
)
BART = dataclasses.replace(MARIAN, positions="learned", position_offset=2, embedding_norm=True, embedding_scale=1.0)
SEQUENCE_TO_SEQUENCE = {"marian": MARIAN, "t5": T5, "bart": BART}


def build(cfg):
    model = Model(cfg)
    return model, jax.jit(model.init)(jax.random.key(1))


def ids(seed, batch=2, length=8):
    return jax.random.randint(jax.random.key(seed), (batch, length), 1, 40)


@pytest.fixture(scope="module", params=list(SEQUENCE_TO_SEQUENCE))
def translator(request):
    return build(SEQUENCE_TO_SEQUENCE[request.param])


def test_an_encoder_sees_both_ways_and_not_its_padding():
    model, params = build(BERT)
    tokens, segments = ids(0), jnp.array([[1] * 6 + [0] * 2] * 2)
    run = jax.jit(lambda t: model.apply(params, t, segment_ids=segments)[0])
    logits = run(tokens)
    assert logits.shape == (2, 8, 40)
    later = run(tokens.at[:, 5].set(tokens[:, 5] % 39 + 1))
    assert float(jnp.abs(later - logits)[:, 0].max()) > 1e-4  # the first token sees the sixth
    padding = run(tokens.at[:, 6:].set(3))
    np.testing.assert_allclose(padding[:, :6], logits[:, :6], atol=1e-6)
    alone = model.apply(params, tokens[:, :6])[0]
    np.testing.assert_allclose(alone, logits[:, :6], atol=1e-5)


def test_segment_types_are_seen():
    model, params = build(BERT)
    one = model.apply(params, ids(0))[0]
    two = model.apply(params, ids(0), token_types=jnp.array([[0] * 4 + [1] * 4] * 2))[0]
    assert float(jnp.abs(one - two).max()) > 1e-3


def test_a_decoder_of_two_stacks_sees_its_source_but_no_padding_and_nothing_later(translator):
    model, params = translator
    source, target = ids(3, 2, 7), ids(4, 2, 6)
    segments = jnp.array([[1] * 5 + [0] * 2] * 2)

    @jax.jit
    def run(source, target):
        memory, _ = model.encode(params, source, segment_ids=segments)
        return model.head(params, model.features(params, target, memory=memory)[0])

    logits = run(source, target)
    np.testing.assert_allclose(run(source.at[:, 5:].set(1), target), logits, atol=1e-6)
    assert float(jnp.abs(run(source.at[:, 4].set(source[:, 4] % 39 + 1), target) - logits)[:, 0].max()) > 1e-5
    later = run(source, target.at[:, 4:].set(target[:, 4:] % 39 + 1))
    np.testing.assert_allclose(later[:, :4], logits[:, :4], atol=1e-6)
    assert float(jnp.abs(later - logits)[:, 4:].max()) > 1e-4


def test_decoding_step_by_step_with_the_source_in_the_cache(translator):
    model, params = translator
    source, target = ids(3, 2, 7), ids(4, 2, 6)
    segments = jnp.array([[1] * 7, [1] * 4 + [0] * 3])
    memory, _ = model.encode(params, source, segment_ids=segments)
    expected = model.head(params, model.features(params, target, memory=memory)[0])
    cache = model.empty_cache(2, 8, source_slots=7)
    hidden, aux = model.features(params, target[:, :1], memory=memory, cache=cache)
    got, step = [hidden], jax.jit(lambda t, c: model.features(params, t, cache=c))
    for i in range(1, 6):
        hidden, aux = step(target[:, i : i + 1], aux["cache"])
        got.append(hidden)
    np.testing.assert_allclose(model.head(params, jnp.concatenate(got, 1)), expected, atol=3e-5)


def test_layers_are_numbered_through_and_every_parameter_has_axes(translator):
    model, params = translator
    encoder = model.cfg.encoder_layers
    assert sorted(params["layers"]) == [str(i) for i in range(model.cfg.total_layers)]
    assert [("cross_attention" in params["layers"][str(i)]) for i in range(model.cfg.total_layers)] == [
        i >= encoder for i in range(model.cfg.total_layers)
    ]
    shapes, axes = abstract(model.cfg)
    assert {path: leaf.shape for path, leaf in flatten(shapes).items()} == {
        path: leaf.shape for path, leaf in flatten(params).items()
    }
    assert set(axes) == set(flatten(params))
    assert ModelConfig.from_json(model.cfg.to_json()) == model.cfg


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_a_text_is_read_from_its_real_tokens_only(pooling):
    cfg = dataclasses.replace(BERT, head="sequence", classes=3, pooler="tanh", pooling=pooling, head_bias=False)
    model, params = build(cfg)
    tokens, segments = ids(0), jnp.array([[1] * 8, [1] * 5 + [0] * 3])
    logits = model.apply(params, tokens, segment_ids=segments)[0]
    assert logits.shape == (2, 3)
    alone = model.apply(params, tokens[1:, :5])[0]
    np.testing.assert_allclose(alone[0], logits[1], atol=1e-5)
    hidden = np.asarray(model.features(params, tokens, segment_ids=segments)[0])
    expected = {"first": hidden[:, 0], "last": hidden[[0, 1], [7, 4]], "mean": None}[pooling]
    if expected is None:
        expected = np.stack([hidden[0].mean(0), hidden[1, :5].mean(0)])
    np.testing.assert_allclose(model.pool(jnp.asarray(hidden), segments), expected, atol=1e-6)


def test_a_head_for_tokens_and_none_at_all():
    model, params = build(dataclasses.replace(BERT, head="tokens", classes=2, head_bias=False))
    assert model.apply(params, ids(0))[0].shape == (2, 8, 2)
    model, params = build(dataclasses.replace(BERT, head="none", head_bias=False))
    assert "head" not in params
    with pytest.raises(ValueError, match="no head"):
        model.apply(params, ids(0))


def slow_bucket(distance, causal, buckets, most):
    """T5's rule for one pair, written from the paper's description."""
    first = 0
    if causal:
        away = max(-distance, 0)
    else:
        buckets //= 2
        first = buckets if distance > 0 else 0
        away = abs(distance)
    exact = buckets // 2
    if away < exact:
        return first + away
    far = exact + int(math.log(away / exact) / math.log(most / exact) * (buckets - exact) + 1e-6)
    return first + min(far, buckets - 1)


@settings(deadline=None, max_examples=60)
@given(st.integers(-300, 300), st.booleans(), st.sampled_from([(8, 16), (32, 128)]))
def test_relative_buckets_equal_the_rule_for_one_pair(distance, causal, sizes):
    buckets, most = sizes
    start = jnp.array([[300]])
    got = relative_buckets(start, start + distance, causal=causal, buckets=buckets, distance=most)
    assert int(got[0, 0, 0]) == slow_bucket(distance, causal, buckets, most)


def test_sinusoids_are_those_of_the_paper():
    got = np.asarray(sinusoidal(jnp.array([[0, 3, 17]]), 6))[0]
    for row, position in zip(got, (0, 3, 17)):
        angles = [position / 10_000 ** (2 * i / 6) for i in range(3)]
        np.testing.assert_allclose(row, [*map(math.sin, angles), *map(math.cos, angles)], atol=1e-6)


def test_stretched_rotary_angles_keep_the_fast_and_slow_down_the_slow():
    positions = jnp.array([[1]])
    plain = np.arctan2(*np.asarray(rotary_angles(positions, 64, 10_000.0))[::-1])[0, 0]
    stretched = np.arctan2(*np.asarray(rotary_angles(positions, 64, 10_000.0, (8.0, 1.0, 4.0, 512.0)))[::-1])[0, 0]
    turns = 512 * plain / (2 * math.pi)
    np.testing.assert_allclose(stretched[turns > 4], plain[turns > 4], rtol=1e-5)
    np.testing.assert_allclose(stretched[turns < 1], plain[turns < 1] / 8, rtol=1e-4)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((stretched < plain) & (stretched > plain / 8))[between].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "encoder"}, "config.model.head: an encoder sees the words"),
        ({"family": "encoder_decoder"}, "config.model.encoder_layers: 0 does not go with family 'encoder_decoder'"),
        ({"encoder_layers": 2}, "config.model.encoder_layers: 2 does not go with family 'decoder'"),
        ({"family": "encodr", "head": "none"}, "did you mean 'encoder'"),
        ({"positions": "relative", "heads": (4, 2), "head_dim": 8}, "layers of a stack share one table"),
        ({"relative_buckets": 7}, "relative_buckets must be even"),
        ({"rotary_scaling": (2.0,)}, "rotary_scaling: needs no or four numbers"),
    ],
)
def test_families_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_head_without_classes_and_a_decoder_without_a_source_are_refused():
    with pytest.raises(UserError, match=r"config\.model\.classes"):
        Model(dataclasses.replace(BERT, head="sequence"))
    model, params = build(MARIAN)
    with pytest.raises(ValueError, match="needs `memory`"):
        model.features(params, ids(0))
