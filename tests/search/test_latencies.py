"""Timings of units: what is added up is what the clock said, on a clock that is made up; nothing here is timed."""

import pytest

from fastlm.errors import UserError
from fastlm.measurement.ruler import Load
from fastlm.models import Compute, ModelConfig
from fastlm.search import clock, latencies
from fastlm.search.latencies import Sizes

CFG = ModelConfig(vocab_size=32, max_length=64, layers=4, width=16, heads=4, feed_forward_width=64)
LOAD = Load(1, 8, 8)


def seconds(cfg):
    """3 for what is no layer's, a second for each head and two for each 16 units of all layers."""
    layers = [cfg.layer(i) for i in range(cfg.layers)]
    return 3 + sum(layer.heads + layer.feed_forward_width / 8 for layer in layers)


@pytest.fixture(autouse=True)
def made_up_clock(monkeypatch):
    runs = []

    def runner(cfg, compute):
        def run(load):
            assert load == LOAD
            runs.append(cfg)
            slow = 1 + (len(runs) - 1) // 4 % 3  # what the machine does besides
            return [seconds(cfg) * slow / 2] * 2

        return run

    monkeypatch.setattr(clock, "runner", runner)


def test_costs_of_layers_add_up():
    found = latencies.table(CFG, Compute(), [1, 2, 3, 4], [16, 32, 999], LOAD)
    whole = seconds(CFG)
    assert found.rest == pytest.approx(3 / whole)
    cost = found.cost(CFG)
    assert cost(0, Sizes(4, 4, 64)) == pytest.approx(12 / whole)
    assert cost(1, Sizes(1, 1, 16)) == pytest.approx(3 / whole)
    assert cost(2, Sizes(3, 3, 32)) == pytest.approx(7 / whole)
    with pytest.raises(KeyError):  # never timed
        cost(0, Sizes(4, 4, 48))


def test_layers_that_differ_are_timed_each():
    mixed = ModelConfig(
        **{**vars(CFG), "attention": ("full", "local(window=8)"), "feed_forward_width": (64, 64, 32, 64)}
    )
    found = latencies.table(mixed, Compute(), [2], [16], LOAD)
    kinds = {kind for kind, _ in found.layers}
    assert len(kinds) == 3
    assert found.cost(mixed)(2, Sizes(2, 2, 32)) == pytest.approx(6 / seconds(mixed))
    assert found.rest + sum(
        found.cost(mixed)(i, latencies.whole_of(mixed.layer(i))) for i in range(4)
    ) == pytest.approx(1)


def test_two_stacks_are_refused():
    with pytest.raises(UserError, match="with one stack"):
        latencies.table(ModelConfig(family="encoder_decoder", encoder_layers=1, vocab_size=8), Compute(), [], [], LOAD)


def test_a_load_has_room():
    assert clock.load_of(CFG, Compute(), 2, 500, 16) == Load(2, 40, 16)
    encoder = ModelConfig(**{**vars(CFG), "family": "encoder", "head": "none"})
    assert clock.load_of(encoder, Compute(), 2, 500, 16) == Load(2, 64)
