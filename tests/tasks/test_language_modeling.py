"""Metrics of language modelling mean what their names say."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from fastlm.data import tokenizers
from fastlm.data.settings import Data
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.tasks import language_modeling
from fastlm.tasks.language_modeling import LanguageModeling


def test_summarize_by_hand():
    sums = {"nll": 8 * math.log(2), "tokens": 4.0, "bytes": 16.0, "correct": 1.0}
    metrics = language_modeling.summarize(sums)
    assert metrics["loss"] == pytest.approx(2 * math.log(2))
    assert metrics["perplexity"] == pytest.approx(4.0)
    assert metrics["bits_per_byte"] == pytest.approx(0.5)
    assert metrics["accuracy"] == 0.25


def test_summarize_survives_nothing_and_infinity():
    assert math.isfinite(language_modeling.summarize({"nll": 0.0, "tokens": 0.0, "bytes": 0.0, "correct": 0.0})["loss"])
    assert language_modeling.summarize({"nll": 1e9, "tokens": 1.0, "bytes": 1.0, "correct": 0.0})["perplexity"] > 1e300


def test_bytes_are_those_of_the_scored_targets_only():
    model = Model(ModelConfig(vocab_size=8, max_length=8, layers=1, width=8, heads=1))
    task = language_modeling.make(model, np.array([0, 1, 2, 3, 4], np.int32))  # ids 5 to 7 stand for nothing
    params = task.init(jax.random.key(0), model.init(jax.random.key(0)))
    batch = {
        "tokens": np.array([[1, 2, 3, 4]], np.int32),
        "targets": np.array([[2, 3, 4, 7]], np.int32),
        "loss_mask": np.array([[1, 0, 1, 1]], np.float32),
    }
    total, count, (_, aux) = task.loss(params, task.constants, (), batch, 0, None)
    assert float(aux["sums"]["bytes"]) == 2 + 4 + 0
    assert float(count) == 3
    assert float(total) == pytest.approx(float(aux["sums"]["nll"]))


@pytest.mark.parametrize("attention", ["transformer_xl(memory=40)", ("linear", "local(window=7)")])
def test_short_rows_with_memory_score_as_one_long_row_does(attention):
    """The memory holds all that came before here, so how a document is cut into rows must not matter."""
    model = Model(ModelConfig(vocab_size=16, max_length=64, layers=2, width=16, heads=2, attention=attention))
    task = language_modeling.make(model, np.ones(16, np.int32))
    params = task.init(jax.random.key(0), model.init(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, 16, (2, 33)).astype(np.int32)
    segments = np.array([[1] * 32, [1] * 11 + [2] * 21], np.int32)
    positions = np.array([range(32), [*range(11), *range(21)]], np.int32)

    def batch(start, stop):
        own = segments[:, start:stop] - segments[:, start : start + 1] + 1
        return {
            "tokens": tokens[:, start:stop],
            "targets": tokens[:, start + 1 : stop + 1],
            "loss_mask": np.ones((2, stop - start), np.float32),
            "segment_ids": own,
            # As rows come: what is left of a document counts from 0 in each of them.
            "positions": np.where(own == 1, np.arange(stop - start), positions[:, start:stop]).astype(np.int32),
            "reset": np.full(2, start == 0),
        }

    predict = jax.jit(task.predict)
    _, whole = predict(params, task.constants, task.carry(2), batch(0, 32))
    carry, parts = task.carry(2), []
    for start in (0, 8, 16, 24):
        carry, scores = predict(params, task.constants, carry, batch(start, start + 8))
        parts.append(scores["nll"])
    np.testing.assert_allclose(np.concatenate(parts, 1), whole["nll"], atol=2e-5)
    np.testing.assert_array_equal(carry.length, [32, 21])
    _, forgetful = predict(params, task.constants, task.carry(2), batch(8, 16))
    assert np.abs(np.asarray(forgetful["nll"]) - parts[1]).max() > 1e-3


def test_learned_positions_do_not_go_on_from_row_to_row():
    cfg = ModelConfig(vocab_size=256, attention=("full", "linear"), positions="learned")
    fit = lambda cfg, mode: LanguageModeling().fit(cfg, tokenizers.make("bytes"), Data(sources=(), mode=mode))
    with pytest.raises(UserError, match=r"config\.data\.mode: in a 'stream' positions count on"):
        fit(cfg, "stream")
    assert fit(cfg, "packed").positions == "learned"
    fit(dataclasses.replace(cfg, attention="full"), "stream")  # sees each row alone
    fit(dataclasses.replace(cfg, positions="rotary"), "stream")
