"""What Transformer-XL has beside the contract that all kinds share: long rows in blocks of queries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.models.attention.transformer_xl import attend_in_blocks
from fastlm.ops.masks import MaskSpec

PAST, TOKENS = 5, 11


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_rows_in_blocks_are_rows_at_once_with_gradients(causal, packed):
    keys = jax.random.split(jax.random.key(0), 5)
    made = lambda key, *shape: jax.random.normal(keys[key], shape)
    content, position = made(0, 2, TOKENS, 4, 8), made(1, 2, TOKENS, 4, 8)
    k, v = made(2, 2, PAST + TOKENS, 2, 8), made(3, 2, PAST + TOKENS, 2, 8)
    documents = np.sort(np.random.default_rng(0).integers(0, 3, (2, PAST + TOKENS)), axis=1)[:, ::-1].copy()
    segments = (jnp.asarray(documents[:, PAST:]), jnp.asarray(documents)) if packed else (None, None)
    mask = MaskSpec(causal, *segments, jnp.full((2,), PAST))

    def run(block):
        filling = -TOKENS % block
        ahead = 0 if causal else TOKENS - 1
        # The same vector for the same distance, however many come before it.
        r = jax.random.normal(keys[4], (64, 4, 8))[64 - (PAST + TOKENS + filling + ahead) :]

        def loss(content, position, k, v, r):
            y = attend_in_blocks(content, position, k, v, r, mask, past=PAST, block=block, scale=0.3)
            seen = jnp.ones((2, TOKENS)) if segments[0] is None else (segments[0] != 0)
            return jnp.sum(jnp.sin(y) * seen[..., None, None]), y * seen[..., None, None]

        gradients, y = jax.jit(jax.grad(loss, range(5), has_aux=True))(content, position, k, v, r)
        return [y, *gradients[:4], gradients[4][filling:]]

    whole = run(TOKENS)
    for block in (2, 4):  # with blocks of 2 a causal row goes in parts
        for got, want in zip(run(block), whole, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)
