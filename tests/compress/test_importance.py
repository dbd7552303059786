"""Scores of units, and choosing by them: the largest, in the places that a smaller model has for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress import importance
from fastlm.compress.parts import Part
from fastlm.models import ModelConfig, abstract, slicing, units
from fastlm.ops.paths import map_with_path
from fastlm.parallel import mesh as meshes
from fastlm.parallel import rules
from tests.models.random_weights import drawn

CFG = ModelConfig(vocab_size=13, max_length=12, layers=2, width=16, heads=4, kv_heads=2, feed_forward="swiglu")


def louder(cfg, params, chosen, factor=3.0):
    """Multiplies all weights of some units (unit -> numbers)."""

    def scale(path, leaf):
        for axis, unit in enumerate(units.axes(cfg)[path]):
            if unit in chosen:
                factors = np.ones(units.counts(cfg)[unit], np.float32)
                factors[list(chosen[unit])] = factor
                factors = np.repeat(factors, leaf.shape[axis] // len(factors))
                leaf = leaf * factors.reshape([-1 if other == axis else 1 for other in range(leaf.ndim)])
        return leaf

    return map_with_path(scale, params)


def test_magnitude_is_the_norm_of_all_that_touches_a_unit():
    params = drawn(CFG)
    scores = importance.magnitude(CFG, params)
    layer = params["layers"]["1"]
    of_unit = [layer["feed_forward"][name] for name in ("up", "gate")] + [layer["feed_forward"]["down"].T]
    wanted = np.sqrt(sum(np.square(matrix[:, 5]).sum() for matrix in of_unit))
    np.testing.assert_allclose(scores[units.feed_forward(1)][5], wanted, rtol=1e-5)
    q, out = layer["attention"]["q"], layer["attention"]["out"]
    wanted = np.sqrt(np.square(q[:, 8:12]).sum() + np.square(out[8:12]).sum())
    np.testing.assert_allclose(scores[units.heads(1)][2], wanted, rtol=1e-5)
    assert {unit: score.shape[0] for unit, score in scores.items()} == dict(units.counts(CFG))


@pytest.mark.parametrize("changes", [{}, {"positions": "relative", "kv_heads": 0}, {"attention": "gated_linear"}])
def test_what_is_loud_is_kept(changes):
    family = {"family": "encoder", "head": "none"} if "attention" in changes else {}
    cfg = dataclasses.replace(CFG, **changes, **family)
    loud = {units.HIDDEN: (1, 2, 3, 5, 8, 13), units.feed_forward(0): (0, 7), units.feed_forward(1): (3, 60)}
    halves = "attention" in changes
    loud |= {units.heads(i): (0, 2) if halves or cfg.positions == "relative" else (0, 1) for i in range(2)}
    loud |= {units.heads(i, kind="kv_heads"): (0,) for i in range(2)} if not halves and cfg.kv_heads else {}
    params = louder(cfg, drawn(cfg), loud)
    part = Part(width=6, feed_forward_width=2, heads=2)
    small = part.config(cfg)
    kept = importance.largest(cfg, small, importance.magnitude(cfg, params))
    assert kept.hidden == loud[units.HIDDEN] and kept.feed_forward == {0: (0, 7), 1: (3, 60)}
    if halves:
        assert all(own[0] < 2 <= own[1] for own in kept.heads.values())
    else:
        assert kept.heads == {i: loud[units.heads(i)] for i in range(2)}
    cut, sliced = slicing.keep_width(cfg, params, kept)
    assert cut == small
    taken = part.take(cfg, params, meshes.make())
    assert all(map(np.array_equal, jax.tree.leaves(taken), jax.tree.leaves(sliced)))


def test_a_part_is_the_same_of_weights_that_are_cut_over_devices():
    part, params, mesh = Part((1,), width=8, feed_forward_width=16, heads=2), drawn(CFG), meshes.make(fsdp=2, tensor=2)
    placed = jax.device_put(params, rules.shardings(params, abstract(CFG)[1], mesh))
    jax.set_mesh(mesh)
    found = part.take(CFG, placed, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, part.take(CFG, params, mesh))
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, abstract(part.config(CFG))[0])


def test_equal_scores_keep_the_first():
    scores = {unit: jnp.ones(count) for unit, count in units.counts(CFG).items()}
    part = Part(width=8, feed_forward_width=4, heads=2)
    kept = importance.largest(CFG, part.config(CFG), scores)
    assert kept.hidden == tuple(range(8)) and kept.feed_forward[1] == (0, 1, 2, 3) and kept.heads[0] == (0, 1)


def test_heads_go_by_whole_groups_or_else_from_each():
    assert [Part(heads=2).config(CFG).layer(0).kv_heads, Part(heads=2).config(CFG).layer(0).heads] == [1, 2]
    cfg = dataclasses.replace(CFG, heads=6, head_dim=2)  # groups of three
    assert (Part(heads=3).config(cfg).kv_heads, Part(heads=4).config(cfg).kv_heads) == (1, 2)
    kept = importance.largest(cfg, Part(heads=4).config(cfg), importance.magnitude(cfg, drawn(cfg)))
    assert [sum(head < 3 for head in own) for own in kept.heads.values()] == [2, 2]


def test_layers_that_have_less_keep_it():
    cfg = dataclasses.replace(CFG, heads=(4, 2), kv_heads=0, head_dim=4, feed_forward_width=(32, 8))
    small = Part(feed_forward_width=16, heads=3).config(cfg)
    assert (small.heads, small.feed_forward_width, small.kv_heads) == ((3, 2), (16, 8), 0)
    taken = Part(feed_forward_width=16, heads=3).take(cfg, drawn(cfg), meshes.make())
    assert taken["layers"]["0"]["attention"]["k"].shape == (16, 12)
