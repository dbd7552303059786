"""Decoding with every weight shared by several devices: the same texts, and caches cut as the heads are."""

import jax
import numpy as np
import pytest

from fastlm.decoding import batching, beam, drafts, inputs, sample, speculative
from fastlm.models import Model, ModelConfig, abstract
from fastlm.parallel import mesh as meshes
from fastlm.parallel import rules

CFG = ModelConfig(
    vocab_size=24, max_length=64, layers=2, width=32, heads=8, kv_heads=4, feed_forward="swiglu", init_scale=0.3
)
ROWS = [[3, 5, 7], [2, 9, 4, 4, 1], [6], [8, 8]]
GREEDY = sample.Sampling(temperature=0.0)


@pytest.fixture
def alone_and_cut():
    """The same weights on one device, and on a mesh that is in force."""
    model = Model(CFG)
    params = model.init(jax.random.key(0))
    mesh = meshes.make(tensor=4)
    shapes, axes = abstract(CFG)
    cut = jax.device_put(params, rules.shardings(shapes, axes, mesh))

    def on_the_mesh(call):
        jax.set_mesh(mesh)
        return call(cut)

    return model, params, on_the_mesh


def whole(chunks):
    return np.concatenate(list(chunks), axis=1)


def test_texts_are_the_same(alone_and_cut):
    model, params, on_the_mesh = alone_and_cut
    drawn = sample.Sampling(temperature=0.9, top_p=0.9)
    texts = lambda params: [
        whole(sample.generate(model, params, ROWS, max_tokens=10, how=how, seed=3)) for how in (GREEDY, drawn)
    ]
    alone = texts(params)
    np.testing.assert_array_equal(on_the_mesh(texts), alone)


@pytest.mark.slow
def test_every_way_to_write_does(alone_and_cut):
    model, params, on_the_mesh = alone_and_cut

    def texts(params):
        served = batching.serve(model, params, ROWS, max_tokens=6, rows=2, how=GREEDY)
        drafted = speculative.generate(model, params, drafts.LookupDraft(), None, ROWS, max_tokens=6, how=GREEDY)
        searched = beam.search(model, params, ROWS, max_tokens=6, beams=2)
        by_number = sorted(served, key=lambda text: text.number)
        return (
            [text.tokens for text in by_number],
            sample.until_end(drafted),
            [[hypothesis.tokens for hypothesis in row] for row in searched],
        )

    alone = texts(params)
    assert on_the_mesh(texts) == alone


def test_caches_are_cut_as_heads_are_and_stay_where_they_lie(alone_and_cut):
    model, _, on_the_mesh = alone_and_cut
    batch = inputs.make(CFG, ROWS, None, 8)
    cache, logits = on_the_mesh(lambda params: sample.prefill(model, params, 32, batch))
    spec = jax.sharding.PartitionSpec(("data",), ("tensor",))
    for layer in cache.layers.values():
        assert layer.keys.sharding.is_equivalent_to(jax.NamedSharding(layer.keys.sharding.mesh, spec), 4)
    keys = sample.row_keys(0, range(4))
    written = np.zeros(4, np.int32)
    lower = lambda params: sample.decode.lower(
        model, params, 4, GREEDY, sample.token_rules.make(24, 8), cache, logits, keys, written
    )
    text = on_the_mesh(lower).compile().as_text()
    kept = cache.layers["0"].keys
    # Nothing as large as a layer's cache crosses devices in a step.
    gathered = [
        line for line in text.splitlines() if "all-gather(" in line and f"{CFG.kv_heads},{kept.shape[2]}" in line
    ]
    assert "all-reduce" in text and not gathered
