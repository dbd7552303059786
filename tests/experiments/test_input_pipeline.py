"""Shares of the step time in a tiny run."""

import dataclasses

import pytest

from experiments.benchmarks import input_pipeline
from fastlm.training import build


def test_the_parts_of_a_step_make_the_whole(tiny_config, tmp_path, one_device):
    tiny_config["evaluation"] |= {"split": "", "final_split": ""}
    experiment = build.build(tiny_config, tmp_path)
    result = input_pipeline.measure(experiment, steps=3, skip=1)
    seconds = result.next_batch + result.to_device + result.compute
    assert min(dataclasses.astuple(result)) > 0
    assert result.tokens_per_second == pytest.approx(8 * 32 / seconds)
    assert result.share == pytest.approx(1 - result.compute / seconds)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_table_shows_shares_that_sum_to_one():
    result = input_pipeline.Result(10, 0.001, 0.002, 0.097, 1000.0, 50_000.0)
    text = input_pipeline.table(result)
    shares = [float(line.split("|")[3].strip(" %")) for line in text.splitlines()[2:5]]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    assert result.share == pytest.approx(0.03)
    assert "(50 times that)" in text
