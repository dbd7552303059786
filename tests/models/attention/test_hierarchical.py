"""Hierarchical attention: what holds for any length, and rows that go into a cache in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models import attention as kinds
from fastlm.models.attention.hierarchical import HierarchicalOptions, near_and_far
from fastlm.ops.masks import MaskSpec
from tests.models.attention import bench
from tests.models.attention.cases import CASES


def test_equal_keys_give_the_mean_of_everything_visible():
    """Each visible token counts exactly once, wherever documents and padding cut the groups."""
    lengths = [37, 1, 26, 9]
    segments = np.repeat([1, 2, 3, 0], lengths)[None]
    v = jax.random.normal(jax.random.key(0), (1, 73, 1, 4))
    options = HierarchicalOptions(block=4, means=2)
    attend = jax.jit(
        lambda v: near_and_far(v, v * 0, v, jnp.asarray(segments), causal=False, options=options, scale=1.0)
    )
    y = attend(v)[0, :, 0]
    see = segments[0][:, None] == segments[0]
    want = see @ v[0, :, 0] / see.sum(-1, keepdims=True)
    np.testing.assert_allclose(y[:64], want[:64], atol=1e-5)


def test_rows_written_in_pieces_equal_the_row_at_once_and_show_their_weights():
    case = next(case for case in CASES if case.spec == "hierarchical(block=4, means=2)")
    cfg, params, x = bench.layer(case, True), bench.params_of(case), bench.inputs(27)
    layer = bench.module(case, cfg, ("attention",))
    place = jnp.broadcast_to(jnp.arange(27), (2, 27))
    run = jax.jit(lambda x, **look: layer.apply({"params": params}, x, x, **look))
    whole, _, aux = run(x, positions=place, mask=MaskSpec())
    cache, pieces, maps = kinds.empty_cache(case.spec, cfg, 2, 27, jnp.float32), [], []
    for first, last in ((0, 9), (9, 18), (18, 27)):  # neither begin nor end with a block
        mask = MaskSpec(offset=jnp.full((2,), first))
        y, cache, found = run(x[:, first:last], positions=place[:, first:last], mask=mask, cache=cache)
        pieces.append(y)
        maps.append(found["attention"])
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(maps, 2)[..., :27], aux["attention"], atol=1e-5)


def test_means_have_to_divide_a_block():
    with pytest.raises(UserError, match="means divide block"):
        HierarchicalOptions(block=6, means=4)
