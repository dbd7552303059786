"""Fused products: fewer and larger weights, and the same model."""

import dataclasses

import jax
import numpy as np
import pytest

from fastlm.models import Model, ModelConfig, fusion
from fastlm.ops.paths import flatten

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


def test_a_part_is_fused_as_the_whole_is():
    cfg, params = LLAMA, made(LLAMA)[1]
    whole = fusion.fuse(cfg, params)[1]
    for part in ({"layers": {"0": params["layers"]["0"]}}, {"embedding": params["embedding"]}):
        found = fusion.fuse(cfg, part)[1]
        wanted = {name: whole[name] if name != "layers" else {"0": whole[name]["0"]} for name in part}
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
