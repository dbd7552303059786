"""Trainings as processes: side by side, in shares of the cores, ended when their parent is."""

import os
import sys
import time

import pytest

from experiments import runs

# Waits until as many have begun as it is told to, then says on which cores it was.
TRAINER = """
import json, os, pathlib, sys, time
options = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
folder, together = pathlib.Path(options["workdir"]), int(options["together"])
folder.mkdir()
(folder / "begun").touch()
end = time.time() + 20
while len(list(folder.parent.glob("*/begun"))) < together:
    if time.time() > end:
        sys.exit("the others did not begin")
    time.sleep(0.02)
if "fail" in folder.name:
    sys.exit(1)
if "forever" in folder.name:
    time.sleep(60)
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
(folder / "result.json").write_text(json.dumps({"metrics": {"cores": cores}}))
"""


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Makes trainings with these names that wait for so many to have begun."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(runs, "TRAINER", (str(tmp_path / "trainer.py"),))
    return lambda names, together: [((f"--together={together}",), tmp_path / "runs" / name) for name in names]


def test_side_by_side_in_shares_of_the_cores(trainings):
    outcomes = dict(runs.train_each(trainings(["a", "fail", "b", "c"], 2), at_once=2))
    assert outcomes.keys() == {0, 1, 2, 3} and outcomes[1] is None
    assert all(outcomes[place].peak_memory > 1 for place in (0, 2, 3))
    if sys.platform == "linux":
        mine = os.sched_getaffinity(0)
        for place in (0, 2, 3):
            cores = set(outcomes[place].metrics["cores"])
            assert cores <= mine and len(cores) <= max((len(mine) + 1) // 2, 1)


def test_one_after_the_other_has_all_cores(trainings):
    outcomes = list(runs.train_each(trainings(["a", "b"], 1)))
    assert [place for place, _ in outcomes] == [0, 1]
    if sys.platform == "linux":
        assert all(set(outcome.metrics["cores"]) == os.sched_getaffinity(0) for _, outcome in outcomes)


def test_those_that_run_end_with_the_one_who_waits(trainings):
    begun = time.monotonic()
    outcomes = runs.train_each(trainings(["a", "forever"], 2), at_once=2)
    assert next(outcomes)[0] == 0
    outcomes.close()
    assert time.monotonic() - begun < 40
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)
