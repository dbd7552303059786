"""Compiling at two depths: what the rows say about memory and where they come from."""

import dataclasses

import jax
import pytest

from experiments.benchmarks import depth


@pytest.fixture(scope="module")
def rows():
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_disable_most_optimizations", True)  # compiles three times faster
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depth, "VOCABULARY", 32)
        patch.setattr(depth, "ROWS", 2)
        patch.setattr(depth, "LENGTH", 8)
        found = [depth.measure(layers, 16, "none") for layers in (1, 3)]
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", cached)
    return found


def test_state_grows_by_the_parameters_of_a_layer(rows):
    # 12 D^2 weights and 2 D scales a layer, each with two moments, all float32.
    layer = 4 * 3 * (12 * 16**2 + 2 * 16)
    assert (rows[1].arguments - rows[0].arguments) * 2**20 == pytest.approx(2 * layer, rel=0.01)
    assert rows[1].temporaries > rows[0].temporaries


def test_every_stage_was_measured(rows):
    for row in rows:
        assert min(row.trace, row.lower, row.compile, row.wall) > 0
        assert row.peak_rss > 50


def test_table_has_a_line_for_each_depth(rows):
    lines = depth.table(rows).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "3"]
    assert {line.count("|") for line in lines} == {len(dataclasses.fields(depth.Row)) + 1}
