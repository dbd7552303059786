"""New tokens against a cache by slot: few gather their keys, many are put at their slots; both equal whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.models.attention import block_sparse, dilated
from fastlm.ops.cached_patterns import attend_cached

SLOTS = 40
BLOCKS = block_sparse.BlockSparseOptions(block=2, window=1, global_blocks=1, random=1)
PATTERNS = {
    "dilated": (
        functools.partial(dilated._slots_of, stride=5, slots=SLOTS),
        functools.partial(dilated.strided, segments=None, stride=5, causal=True, scale=0.5),
    ),
    "block_sparse": (
        functools.partial(block_sparse._slots_of, pattern=BLOCKS, slots=SLOTS),
        functools.partial(block_sparse.attend_pattern, segments=None, pattern=BLOCKS, causal=True, scale=0.5),
    ),
}


@pytest.mark.parametrize("name", list(PATTERNS))
@pytest.mark.parametrize("tokens", [3, 11])
def test_tokens_at_any_slot_equal_whole_rows(name, tokens):
    slots_of, rows = PATTERNS[name]
    offset = jnp.array([7, 29])
    at = offset[:, None] + jnp.arange(tokens)
    take = jax.vmap(lambda x, at: x[at])

    @jax.jit
    def both(q, k, v):
        return attend_cached(take(q, at), k, v, offset, slots_of, rows, scale=0.5), take(rows(q, k, v), at)

    q, k, v = (jax.random.normal(jax.random.key(i), (2, SLOTS, heads, 4)) for i, heads in enumerate((2, 1, 1)))
    np.testing.assert_allclose(*both(q, k, v), atol=1e-5)


@pytest.mark.parametrize("name", list(PATTERNS))
def test_a_step_reads_no_key_outside_of_the_pattern(name):
    slots_of, rows = PATTERNS[name]
    slot = jnp.array([23])
    keys, there = slots_of(slot[:, None])
    seen = np.isin(np.arange(SLOTS), keys[there])
    assert seen.sum() < SLOTS / 2
    q, k, v = (jax.random.normal(jax.random.key(i), (1, n, 1, 4)) for i, n in enumerate((1, SLOTS, SLOTS)))
    # What is gathered for entries that do not count may be slot 0.
    poisoned = jnp.where((seen | (np.arange(SLOTS) == 0))[:, None, None], v, jnp.nan)
    step = jax.jit(lambda q, k, v: attend_cached(q, k, v, slot, slots_of, rows, scale=0.5))
    assert np.isfinite(step(q, k, poisoned)).all()
