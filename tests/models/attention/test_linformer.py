"""What the projection along the sequence is asked beyond the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.ops.masks import MaskSpec
from tests.models.attention import bench
from tests.models.attention.bench import PADDED, Case

CASE = Case("linformer(rank=5)", None)


def run(x, mask, capture=()):
    cfg, params = bench.layer(CASE, False), bench.params_of(CASE, False)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return bench.module(CASE, cfg, capture).apply({"params": params}, x, x, positions=positions, mask=mask)


def test_the_weights_of_tokens_give_the_heads_and_padding_has_none():
    y, _, aux = run(bench.inputs(15), bench.mask_of(False, PADDED), ("attention", "qkv"))
    value = jnp.repeat(aux["qkv"][2], bench.HEADS, axis=2)
    heads = jnp.einsum("BNTS,BSNH->BTNH", aux["attention"], value)
    np.testing.assert_allclose(heads.reshape(2, 15, -1) @ bench.params_of(CASE, False)["out"], y, atol=1e-4)
    assert float(jnp.abs(aux["attention"][1, :, :, PADDED[1] == 0]).max()) == 0


@pytest.mark.slow
def test_padding_gives_what_the_text_alone_gives():
    x = bench.inputs(15)
    alone = run(x[1:, :8], MaskSpec(False))[0]
    np.testing.assert_allclose(run(x, bench.mask_of(False, PADDED))[0][1:, :8], alone, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_reads_padded_texts_but_no_packed_rows():
    base = {"vocab_size": 11, "layers": 1, "width": 16, "heads": 2, "family": "encoder", "head": "none"}
    model = Model(ModelConfig(**base, attention=CASE.spec, max_length=16))
    params, tokens = model.init(jax.random.key(0)), jnp.arange(20).reshape(2, 10) % 11
    real = jnp.array([[1] * 10, [1] * 6 + [0] * 4])
    run = jax.jit(lambda tokens, real: model.features(params, tokens, segment_ids=real, packed=False)[0])
    np.testing.assert_allclose(run(tokens, real)[1:, :6], run(tokens[1:, :6], real[1:, :6]), atol=1e-5)
    with pytest.raises(UserError, match="cannot keep the documents"):
        model.features(params, tokens, segment_ids=real)


def test_ranks_and_texts_beyond_the_longest_text_are_refused():
    base = {"vocab_size": 11, "layers": 1, "width": 16, "heads": 2, "family": "encoder", "head": "none"}
    with pytest.raises(UserError, match="config.model.attention: linformer: rank 16 saves nothing .* 16 tokens"):
        Model(ModelConfig(**base, attention="linformer(rank=16)", max_length=16))
    with pytest.raises(UserError, match="rank must be at least 1"):
        Model(ModelConfig(**base, attention="linformer(rank=0)", max_length=16))
    with pytest.raises(UserError, match="a text of 33 tokens is longer than config.model.max_length 32"):
        run(bench.inputs(33), MaskSpec(False))
