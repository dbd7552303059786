"""What each part is worth: rewrites are the cuts they stand for, and readings are differences of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress import evidence, importance
from fastlm.models import Model, ModelConfig, abstract, slicing, units
from fastlm.models.units import Kept
from fastlm.ops import paths
from fastlm.reports import sensitivity as report
from fastlm.search import sensitivity
from fastlm.search.sensitivity import WAYS, Reading
from fastlm.tasks import language_modeling

CFG = ModelConfig(
    vocab_size=32, max_length=16, layers=2, width=16, heads=4, kv_heads=2, feed_forward="swiglu", bias=True
)
MODEL = Model(CFG)
MAKE = lambda cfg: language_modeling.make(Model(cfg), np.ones(32, np.int32))


@pytest.fixture(scope="module")
def params():
    noise = lambda leaf, key: leaf + 0.3 * jax.random.normal(key, leaf.shape)
    leaves, tree = jax.tree.flatten(MODEL.init(jax.random.key(0)))
    return jax.tree.unflatten(
        tree, [noise(*pair) for pair in zip(leaves, jax.random.split(jax.random.key(1), len(leaves)))]
    )


def batch(seed):
    tokens = np.random.default_rng(seed).integers(1, 32, (2, 16), dtype=np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": np.ones((2, 16), np.float32)}


@pytest.fixture(scope="module")
def known(params):
    found = sensitivity.matrices(CFG)
    return evidence.gather(MAKE(CFG), {"model": params}, [batch(9)], found, sensitivity.NEEDS)


def mean_loss(cfg, params, batches):
    task = MAKE(cfg)
    found = [task.loss({"model": params}, task.constants, (), one, 0, None)[:2] for one in batches]
    return sum(float(total) for total, _ in found) / sum(float(count) for _, count in found)


def test_zeros_of_units_are_the_cut(params, known):
    """Heads of groups that share a key are taken out one by one; what is left are the heads with the highest scores."""
    tokens = jnp.arange(16).reshape(2, 8)
    _, half, gone = WAYS["feed_forward"].make(CFG, params, known, "layers/1/feed_forward", 0.5)
    scores = importance.of_units(CFG, importance.scores("fisher", paths.flatten(params), known, jax.random.key(0)))
    best = np.sort(np.argsort(-np.asarray(scores[units.feed_forward(1)]))[: CFG.layer(1).feed_forward_width // 2])
    small, cut = slicing.keep_width(CFG, params, Kept(feed_forward={1: best}))
    np.testing.assert_allclose(MODEL.apply(half, tokens)[0], Model(small).apply(cut, tokens)[0], atol=1e-5)
    size = lambda cfg: sum(leaf.size for leaf in jax.tree.leaves(abstract(cfg)[0]))
    assert gone == size(CFG) - size(small)
    _, one_head, _ = WAYS["heads"].make(CFG, params, known, "layers/0/attention", 0.75)
    rows = np.asarray(one_head["layers"]["0"]["attention"]["out"]).reshape(4, -1)
    assert [bool(row.any()) for row in rows].count(True) == 1


def test_readings_are_differences_of_the_loss(params, known):
    batches = [batch(1), batch(2), batch(3)]
    wanted = sensitivity.asked(CFG, WAYS, [0.5])
    assert {way for _, way, _ in wanted} == set(WAYS)
    few = [one for one in wanted if one[0] in ("layers/1", "layers/0/attention/q", "layers/0/feed_forward")]
    before = mean_loss(CFG, params, batches)
    for one in sensitivity.readings(CFG, MAKE, params, known, batches, few):
        cfg, changed, gone = WAYS[one.way].make(CFG, params, known, one.part, one.level)
        np.testing.assert_allclose(one.rise, mean_loss(cfg, changed, batches) - before, atol=1e-5)
        rises = [mean_loss(cfg, changed, [b]) - mean_loss(CFG, params, [b]) for b in batches]
        np.testing.assert_allclose(one.error, np.std(rises, ddof=1) / 3**0.5, atol=1e-5)
        assert one.gone == gone > 0
        if one.way == "layer":
            assert cfg.layers == 1


def test_a_stack_of_one_layer_is_not_emptied():
    cfg = ModelConfig(family="encoder_decoder", vocab_size=8, width=8, heads=1, layers=1, encoder_layers=2)
    assert [part for part, _, _ in sensitivity.asked(cfg, ["layer"], [])] == ["layers/0", "layers/1"]
    assert sensitivity.asked(cfg, ["heads"], [0.5]) == []  # one head each


def test_the_page_and_the_picture_have_every_reading(tmp_path):
    readings = [Reading(f"layers/{i}/attention/q", "zeros", 0.5, 128, 10.0**-i, 1e-3) for i in range(3)]
    readings.append(Reading("layers/1", "layer", 1.0, 4096, 12.5, 0.5))
    picture, page = report.write(readings, {"title": "A <model>", "checkpoint": "step 7"}, tmp_path)
    assert picture.stat().st_size > 5000
    html = page.read_text()
    assert "A &lt;model&gt;" in html and "step 7" in html and "http" not in html
    for text in ("1.000", "0.100", "0.010", ">12<", "attention/q: zeros -50%", "layer: layer"):
        assert text in html
    assert html.index("layers/1</td>") > 0 and html.count("<tr>") >= 2 + 4 + 4
    assert [row.title for row in report.rows(readings)] == ["attention/q: zeros -50%", "layer: layer"]
