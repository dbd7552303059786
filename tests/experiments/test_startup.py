"""Timing a process by what it prints, with stand-ins for training."""

import os
import sys

import pytest

from experiments.benchmarks import startup
from fastlm.errors import UserError

PRINTS = "import time; print('0.1M parameters: 2 layers', flush=True); time.sleep(0.05); "


def test_it_stops_at_the_first_step():
    endless = PRINTS + "print('step=1/9 loss=1', flush=True); time.sleep(600)"
    start = startup.measure([sys.executable, "-c", endless], os.environ, "data")
    assert start.cached == "data"
    assert 0 < start.built < start.first_step < 600


def test_a_run_that_ends_before_is_an_error_with_its_last_line():
    with pytest.raises(UserError, match=r"before its first step: error: no such thing"):
        startup.measure([sys.executable, "-c", PRINTS + "print('error: no such thing')"], os.environ, "data")


def test_the_cache_fills_from_start_to_start(tmp_path, monkeypatch):
    seen = []

    def measure(command, environment, cached):
        folder = tmp_path / "cache" / "compiled"
        seen.append((folder.exists(), environment["FASTLM_CACHE"], command[-1]))
        folder.mkdir(parents=True, exist_ok=True)
        return startup.Start(cached, 1.0, 2.0)

    monkeypatch.setattr(startup, "measure", measure)
    rows = startup.starts(["--config=x.py"], tmp_path)
    assert [row.cached for row in rows] == [startup.NOTHING, startup.DATA, startup.ALL]
    assert [exists for exists, _, _ in seen] == [False, False, True]
    assert len({workdir for _, _, workdir in seen}) == 3  # or the second would resume the first
    assert startup.table(rows).splitlines()[-1] == "| data and programs | 1.0 | 2.0 |"
