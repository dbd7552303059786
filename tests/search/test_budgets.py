"""Choices under a budget: as good as trying everything; sizes of layers that follow from readings."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.models import ModelConfig, abstract
from fastlm.ops import paths
from fastlm.search import layer_sizes, sensitivity
from fastlm.search.budgets import GRAINS, Option, choose
from fastlm.search.sensitivity import Reading

groups = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(groups, st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_it_is_as_good_as_trying_everything(given_groups, budget):
    options = [[Option(n, cost, loss) for n, (cost, loss) in enumerate(group)] for group in given_groups]
    cost = lambda chosen: sum(option.cost for option in chosen)
    loss = lambda chosen: math.fsum(option.loss for option in chosen)
    # Costs are whole numbers, far fewer than there are grains; rounding them up may cost one of them at most.
    possible = [chosen for chosen in itertools.product(*options) if cost(chosen) <= budget]
    if not possible:
        with pytest.raises(UserError, match="the least that there is takes"):
            choose(options, budget, "here")
        return
    found = choose(options, budget, "here")
    assert cost(found) <= budget
    tight = [
        chosen for chosen in possible if cost(chosen) <= budget - (budget + 1) * len(options) / GRAINS
    ] or possible[:0]
    assert all(loss(found) <= loss(chosen) + 1e-9 for chosen in tight)


CFG = ModelConfig(vocab_size=32, max_length=16, layers=3, width=16, heads=4, feed_forward_width=64)


def readings():
    """The first layer needs its feed-forward units, the others their heads; the second is worth nothing."""
    for i in range(3):
        for level in (0.25, 0.5, 0.75):
            yield Reading(f"layers/{i}/feed_forward", "feed_forward", level, 0, level * (4 if i == 0 else 0.01), 0.0)
            yield Reading(f"layers/{i}/attention", "heads", level, 0, level * (0.01 if i == 0 else 3), 0.0)
    yield Reading("layers/1", "layer", 1.0, 0, 0.02, 0.0)


def test_layers_keep_what_they_need():
    cost = layer_sizes.parameters(CFG)
    total = sum(sensitivity.numbers(CFG, i) for i in range(3))
    assert total == sum(
        leaf.size for path, leaf in paths.flatten(abstract(CFG)[0]).items() if path.startswith("layers/")
    )
    found = layer_sizes.search(CFG, readings(), cost, 0.5 * total, "here")
    assert found.part.layers == (0, 2) and found.part.heads[1] == 4 and found.part.feed_forward_width[0] == 64
    assert found.part.feed_forward_width[1] < 64 and found.part.heads[0] < 4
    small = found.part.config(CFG)
    own = sum(leaf.size for path, leaf in paths.flatten(abstract(small)[0]).items() if path.startswith("layers/"))
    assert own == found.cost <= 0.5 * total
    everything = layer_sizes.search(CFG, readings(), cost, total, "here")
    assert everything.rise == 0 and everything.part.config(CFG) == CFG
    with pytest.raises(UserError, match="here: .* cannot be met; the least"):
        layer_sizes.search(CFG, readings(), cost, 0.01 * total, "here")
    with pytest.raises(UserError, match="no readings of heads"):
        layer_sizes.search(CFG, [], cost, total, "here")


def test_heads_stay_where_layers_must_agree():
    """A table of relative positions is one for a stack; grouped keys are cut by whole groups, or not at all."""
    own = [one for one in readings() if one.way == "heads"]
    relative = ModelConfig(**{**vars(CFG), "positions": "relative"})
    assert {
        option.what.heads
        for group in layer_sizes.options(relative, list(readings()), layer_sizes.parameters(relative))
        for option in group
        if option.what
    } == {4}
    grouped = ModelConfig(**{**vars(CFG), "kv_heads": 2})
    kept = {
        option.what[:2]
        for group in layer_sizes.options(grouped, own, layer_sizes.parameters(grouped))
        for option in group
    }
    assert kept == {(4, 2), (2, 1)}
