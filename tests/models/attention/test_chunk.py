"""Chunked attention beyond the contract of all kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models.attention.chunk import ChunkOptions, attend_chunks
from fastlm.ops.attention import plain
from fastlm.ops.masks import MaskSpec


def random(length, seed):
    return jax.random.normal(jax.random.key(seed), (1, length, 2, 4))


def test_a_chunk_without_others_is_attention_of_its_own():
    q, k, v = (random(10, seed) for seed in range(3))
    for causal in (True, False):
        y = attend_chunks(q, k, v, None, jnp.zeros((1,), int), size=4, back=0, causal=causal, scale=0.5)
        for start in (0, 4, 8):
            part = slice(start, min(start + 4, 10))
            want = plain(q[:, part], k[:, part], v[:, part], MaskSpec(causal), scale=0.5)
            np.testing.assert_allclose(y[:, part], want, atol=1e-5)


def test_options_that_cannot_be():
    with pytest.raises(UserError, match="chunk: size must be at least 1"):
        ChunkOptions(size=0)
    with pytest.raises(UserError, match="back not negative"):
        ChunkOptions(back=-1)
