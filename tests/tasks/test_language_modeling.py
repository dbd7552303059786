"""Metrics of language modelling mean what their names say."""

import math

import jax
import numpy as np
import pytest

from fastlm.models import Model, ModelConfig
from fastlm.tasks import language_modeling


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
