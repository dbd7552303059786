"""Block-sparse attention beyond the contract of all kinds."""

import dataclasses

import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.models.attention.block_sparse import BlockSparseOptions, blocks_seen

PATTERN = BlockSparseOptions(block=4, window=3, global_blocks=2, random=3)


def sets(table, counts):
    return [sorted(row[counted]) for row, counted in zip(table, counts)]


@pytest.mark.parametrize("causal", [True, False])
def test_no_block_counts_twice_and_each_has_its_share(causal):
    seen = sets(*blocks_seen(PATTERN, 20, causal))
    for i, row in enumerate(seen):
        assert len(set(row)) == len(row)
        assert {0, 1, i - 1, i} & set(range(i + 1)) <= set(row)
        assert all(j <= i for j in row) or not causal
    assert len(seen[12]) == (2 + 2 + 3 if causal else 3 + 2 + 3)


def test_a_decoder_draws_the_same_however_long_the_row_is():
    short, long = (sets(*blocks_seen(PATTERN, count, True)) for count in (9, 20))
    assert long[:9] == short


def test_the_seed_changes_the_draw():
    other = dataclasses.replace(PATTERN, seed=1)
    assert sets(*blocks_seen(PATTERN, 20, True)) != sets(*blocks_seen(other, 20, True))


def test_short_rows_have_no_columns_that_nothing_fills():
    table, counts = blocks_seen(PATTERN, 1, False)
    assert table.shape == counts.shape == (1, 1) and np.all(counts)


@pytest.mark.parametrize(
    "options, message", [({"window": 2}, "odd"), ({"block": 0}, "block must"), ({"random": -1}, "neg")]
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        BlockSparseOptions(**options)
