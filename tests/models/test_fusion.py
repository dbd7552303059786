"""Fused products: fewer and larger weights, and the same model."""

import dataclasses

import jax
import numpy as np
import pytest

from fastlm.decoding import sample
from fastlm.models import Model, ModelConfig, fusion
from fastlm.ops.paths import flatten
from fastlm.parallel import mesh as meshes
from fastlm.training.restore import Restored

SMALL = ModelConfig(vocab_size=24, max_length=24, layers=2, width=32, heads=4, init_scale=0.3)
LLAMA = dataclasses.replace(SMALL, kv_heads=2, norm="rms_norm", feed_forward="swiglu", qk_norm=True)
MODELS = {
    "llama": LLAMA,
    "gpt": dataclasses.replace(SMALL, positions="learned", bias=True),
    "qwen": dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=False),
    "mixed": dataclasses.replace(LLAMA, attention=("local(window=4)", "latent"), qk_norm=False),
    "states": dataclasses.replace(SMALL, attention=("linear", "gated_delta")),
    "encoder": dataclasses.replace(SMALL, family="encoder", head="masked_language_model", bias=True),
    "translator": dataclasses.replace(SMALL, family="encoder_decoder", encoder_layers=1, feed_forward="geglu"),
}


def made(cfg):
    model = Model(cfg)
    return model, model.init(jax.random.key(0))


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_same(name):
    model, params = made(MODELS[name])
    cfg, fused = fusion.fuse(model.cfg, params)
    assert sum(leaf.size for leaf in jax.tree.leaves(fused)) == sum(leaf.size for leaf in jax.tree.leaves(params))
    tokens = np.random.default_rng(0).integers(0, 24, (2, 9), dtype=np.int32)
    source = {"source": tokens[:, :5]} if cfg.encoder_layers else {}
    wanted, found = model.apply(params, tokens, **source)[0], Model(cfg).apply(fused, tokens, **source)[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_what_reads_the_same_is_one_weight():
    _, params = made(LLAMA)
    _, fused = fusion.fuse(LLAMA, params)
    names = {path for path in flatten(fused) if path.startswith("layers/0") and "norm" not in path}
    assert names == {f"layers/0/{name}" for name in ("attention/qkv", "attention/out")} | {
        f"layers/0/feed_forward/{name}" for name in ("gate_up", "down")
    }
    _, mixed = fusion.fuse(MODELS["mixed"], made(MODELS["mixed"])[1])
    assert "qkv" in mixed["layers"]["0"]["attention"] and "q" in mixed["layers"]["1"]["attention"]
    # What asks and what is looked at are two inputs.
    _, across = fusion.fuse(MODELS["translator"], made(MODELS["translator"])[1])
    assert "qkv" in across["layers"]["1"]["attention"] and "q" in across["layers"]["1"]["cross_attention"]


def test_it_is_made_once():
    cfg, fused = fusion.fuse(LLAMA, made(LLAMA)[1])
    assert fusion.fuse(cfg, fused)[1] is fused


def test_restored_models_write_the_same_and_stay_as_they_are_where_they_are_cut():
    model, params = made(LLAMA)
    restored = Restored(model, params, None, {}, 0)
    options = {"max_tokens": 6, "how": sample.Sampling(temperature=0.0)}
    wanted, found = (
        np.concatenate(list(sample.generate(one.model, one.params, [[3, 5, 7], [2]], **options)), axis=1)
        for one in (restored, restored.fused())
    )
    np.testing.assert_array_equal(found, wanted)
    mesh = meshes.make(tensor=2)
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    everywhere = dataclasses.replace(restored, params=jax.device_put(params, place()))
    assert "qkv" in everywhere.fused().params["layers"]["0"]["attention"]
    cut = jax.tree.map(lambda leaf: jax.device_put(leaf, place(*[None] * (leaf.ndim - 1), "tensor")), params)
    placed = dataclasses.replace(restored, params=cut)
    assert placed.fused() is placed
