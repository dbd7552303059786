"""Entropies and distances worked out by hand, and maps of models whose weights are those of the model."""

import math

import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.measurement import attention_maps
from fastlm.measurement.attention_maps import AttentionMap
from fastlm.models import Model
from tests.decoding import small_models

N = 6


def a_map(weights, **more):
    about = {"stack": "decoder", "layer": 0, "kind": "full", "causal": True, "queries": "tokens", "keys": "tokens"}
    return AttentionMap(**about | more, weights=np.asarray(weights, np.float32))


def test_numbers_that_are_known():
    uniform, identity = np.full((N, N), 1 / N), np.eye(N)
    weights = np.stack([uniform, identity])
    np.testing.assert_allclose(attention_maps.entropy(weights), [math.log(N), 0], atol=1e-12)
    mean_distance = (N * N - 1) / (3 * N)  # of two places drawn from N
    np.testing.assert_allclose(attention_maps.distance(weights), [mean_distance, 0])
    np.testing.assert_allclose(attention_maps.first_token(weights), [1 / N, 1 / N])


def test_the_margin_keeps_all_but_a_thousandth_of_each_query():
    weights = np.array([[[0.9, 0.0995, 0.0005], [0.5, 0.3, 0.2], [0, 0, 0]]])  # the third query looks at nothing
    assert a_map(weights).threshold_margin == pytest.approx(math.log(0.9 / 0.0995), rel=1e-4)
    assert a_map(weights, kind="linear").threshold_margin is None
    assert a_map(3 * weights).threshold_margin is None


def test_signs_and_sums_do_not_matter_to_the_numbers():
    weights = np.array([[[0.5, 0.5], [0.25, 0.75]]])
    other = a_map(weights * [[[-3, 3], [2, -2]]])
    assert other.signed and not other.sums_to_one
    assert a_map(weights).sums_to_one and not a_map(weights).signed
    assert not a_map(3 * weights).sums_to_one and not a_map(3 * weights).signed
    for name in ("entropy", "distance", "first_token"):
        np.testing.assert_allclose(getattr(other, name), getattr(a_map(weights), name), rtol=1e-6)


def test_a_query_that_looks_at_nothing_counts_for_nothing():
    weights = np.array([[[0, 0], [1, 0]], [[0, 0], [0, 0]]])
    np.testing.assert_array_equal(attention_maps.distance(weights), [1, np.nan])
    np.testing.assert_array_equal(attention_maps.entropy(weights), [0, np.nan])
    assert a_map(weights).sums_to_one


def test_what_is_visible_alike():
    causal = np.tril(np.ones((1, N, N))) / np.arange(1, N + 1)[:, None]
    assert a_map(causal).most_entropy == pytest.approx(float(a_map(causal).entropy[0]))
    assert a_map(causal, causal=False).most_entropy == pytest.approx(math.log(N))
    assert a_map(causal, keys="source").distance is None


def test_all_stacks_of_an_encoder_decoder():
    model, params = small_models.build("t5")
    source, tokens = np.array([3, 4, 5, 6, 2]), np.array([1, 7, 8])
    found = attention_maps.capture(model, params, {"tokens": tokens, "source": source})
    assert [(m.stack, m.layer, m.weights.shape[1:]) for m in found] == [
        ("encoder", 0, (5, 5)),
        ("decoder", 1, (3, 3)),
        ("cross", 1, (3, 5)),
    ]
    assert all(one.sums_to_one for one in found)
    assert np.all(np.triu(found[1].weights, 1) == 0)


def test_what_cannot_be_shown(monkeypatch):
    model, params = small_models.build("tiny")
    with pytest.raises(UserError, match="the text has no tokens"):
        attention_maps.capture(model, params, {"tokens": np.array([], np.int32)})
    with pytest.raises(UserError, match="49 tokens, the model's context 48"):
        attention_maps.capture(model, params, {"tokens": np.zeros(49, np.int32)})
    monkeypatch.setattr(attention_maps, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="look at fewer tokens"):
        attention_maps.capture(model, params, {"tokens": np.zeros(8, np.int32)})
    monkeypatch.undo()
    monkeypatch.setattr(Model, "features", lambda *arguments, **options: (None, {}))
    attention_maps._run.clear_cache()
    with pytest.raises(UserError, match="1 of 1 layers show no attention weights; one of these kinds .* full"):
        attention_maps.capture(model, params, {"tokens": np.array([1, 2])})
    attention_maps._run.clear_cache()
