"""Steps to the same loss: the arithmetic on curves, and runs that are kept and found again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.benchmarks import optimizers
from experiments.benchmarks.optimizers import Run
from fastlm.errors import UserError

DECREASING = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8)


def curve(falls):
    """Points every 10 steps, each lower than the last by so much."""
    return [(10 * (i + 1), 10.0 - sum(falls[: i + 1])) for i in range(len(falls))]


@given(DECREASING, st.floats(0, 1))
def test_steps_to_lies_on_the_curve(falls, share):
    points = curve(falls)
    target = points[-1][1] + share * (points[0][1] - points[-1][1])
    step = optimizers.steps_to(points, target)
    assert points[0][0] <= step <= points[-1][0]
    before = max((p for p in points if p[0] <= step), key=lambda p: p[0])
    after = min((p for p in points if p[0] >= step), key=lambda p: p[0])
    assert after[1] - 1e-9 <= target <= before[1] + 1e-9


@given(DECREASING)
def test_twice_as_fast_takes_half_the_steps(falls):
    slow = curve(falls)
    fast = [(step / 2, loss) for step, loss in slow]
    target, rows = optimizers.compare([Run("slow", 0, slow), Run("fast", 0, fast)])
    assert target == slow[-1][1]
    assert rows[1].steps == pytest.approx(rows[0].steps / 2)


def test_the_target_is_what_every_seed_of_the_baseline_reached():
    runs = [Run("a", 0, curve([1, 1])), Run("b", 0, curve([0.1, 0.1])), Run("a", 1, curve([1, 0.5]))]
    target, (a, b) = optimizers.compare(runs)
    assert target == 8.5
    assert (a.seeds, a.steps, a.steps_error) == (2, 17.5 + 0.0, 2.5)
    assert (b.steps, b.steps_error, b.final_error) == (None, None, None)
    assert "| b | 1 | 9.8000 | not reached | - |" in optimizers.table(target, [a, b])


def test_a_bad_run_is_named(tiny_config):
    with pytest.raises(UserError, match="'muon' is not optimizer:rate"):
        optimizers.settings(tiny_config, "muon", 0, 1, 1)


def test_a_finished_run_is_read_and_not_trained_again(tiny_config, tmp_path, one_device, monkeypatch):
    config = optimizers.settings(tiny_config, "adamw:0.01", seed=3, steps=2, every=1)
    first = optimizers.train(config, "adamw:0.01", tmp_path)
    assert [step for step, _ in first.curve] == [1, 2]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["adamw-0.01-seed3.json"]
    assert not (tmp_path / "adamw-0.01-seed3").exists()
    monkeypatch.setattr(optimizers.loop, "run", None)  # calling it would fail
    assert optimizers.train(config, "adamw:0.01", tmp_path) == first
    with pytest.raises(UserError, match="other settings"):
        optimizers.train(config | {"training": config["training"] | {"steps": 3}}, "adamw:0.01", tmp_path)


def test_summary_is_json_and_the_plot_a_picture(tmp_path):
    runs = [Run("a", 0, curve([1, 1])), Run("b", 0, curve([2, 1]))]
    target, rows = optimizers.compare(runs)
    json.dumps([row.__dict__ for row in rows], allow_nan=False)
    optimizers.draw(runs, target, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
