"""The long-range suite's runner, with a trainer that only pretends; and once, slowly, with the real one."""

import json

import pytest

from experiments import long_range, runs
from fastlm.errors import UserError
from fastlm.models import attention

TRAINER = """
import json, os, pathlib, signal, sys
options = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:] if "=" in a)
folder = pathlib.Path(options["workdir"])
print(" ".join(sys.argv[1:]))
if options["config.model.attention"] == "linear" and not (folder / "mended").exists():
    sys.exit("error: no")
folder.mkdir(parents=True, exist_ok=True)
rows = [{"label": label} for label in "aaab"]
(folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
metrics = {"accuracy": 0.9, "accuracy_error": 0.05}
(folder / "result.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))
"""


@pytest.fixture
def run_suite(tmp_path, monkeypatch):
    """Runs the suite in a folder, with a stand-in for the trainer."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(runs, "TRAINER", (str(tmp_path / "trainer.py"),))
    folder = tmp_path / "runs"

    def run(tasks, kinds, seeds=(0,), overrides=()):
        return folder, long_range.run_all(long_range.plan(tasks, kinds, seeds, folder, "", overrides), folder)

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_finished_run_is_not_run_again(run_suite, capsys):
    tasks, kinds, overrides = ("list_ops", "digits"), ("full", "local"), ["training.steps=5"]
    folder, _ = run_suite(tasks, kinds, overrides=overrides)
    first = lines(folder)
    assert [(line["task"], line["kind"]) for line in first] == [(task, kind) for task in tasks for kind in kinds]
    assert first[1]["chance"] == 0.75 and first[1]["rows"] == 4
    assert 5 < first[1]["peak_memory"] < 100_000  # MiB; it begins at what the parent had, here the tests
    printed = (folder / "list_ops" / "local" / "seed0.log").read_text()
    assert "configs/long_range/list_ops.py" in printed and "--config.training.steps=5" in printed
    assert "--config.model.attention=local(window=64)" in printed
    capsys.readouterr()
    _, table = run_suite(tasks, kinds, (0, 1), overrides)
    assert lines(folder)[:4] == first and len(lines(folder)) == 8
    said = capsys.readouterr().out
    assert said.count("seed 1: accuracy 0.900") == 4 and "seed 0:" not in said
    assert (folder / "results.md").read_text().strip() == table and table.count("| 2 | 0.900 ± 0.050 |") == 4
    with pytest.raises(UserError, match=r"with other settings .*training.steps=5.*; name another --folder"):
        run_suite(tasks, kinds, overrides=["training.steps=6"])


def test_a_failed_run_is_named_and_the_others_are_kept(run_suite):
    with pytest.raises(UserError, match=r"1 of 2 runs did not finish \(see .*linear.*seed0.log\)"):
        run_suite(["digits"], ["linear", "full"])
    folder, table = run_suite(["digits"], ["full"])
    assert [line["kind"] for line in lines(folder)] == ["full"]
    assert "error: no" in (folder / "digits" / "linear" / "seed0.log").read_text()
    assert "| digits | full | 1 | 0.900 ± 0.050 | 0.750 | - | - | - |" in table and "linear" not in table
    (folder / "digits" / "linear" / "seed0").mkdir()
    (folder / "digits" / "linear" / "seed0" / "mended").touch()
    _, table = run_suite(["digits"], ["linear", "full"])
    assert "| digits | linear | 1 |" in table


@pytest.mark.parametrize(
    ("tasks", "kinds", "message"),
    [
        (["listops"], ["full"], "unknown 'listops'; did you mean 'list_ops'"),
        (["digits"], ["lokal"], "unknown kind 'lokal'; did you mean 'local'"),
    ],
)
def test_wrong_names_are_one_line(run_suite, tasks, kinds, message):
    with pytest.raises(UserError, match=message):
        run_suite(tasks, kinds)


def result(task, kind, accuracy, seed=0, **more):
    values = {"accuracy_error": 0.01, "chance": 0.5, "rows": 100, "peak_memory": 100.0}
    return long_range.Result(task, kind, seed, accuracy, arguments=(), **values | more)


def test_table():
    table = long_range.table(
        [
            result("pathfinder", "full", 0.51),
            result("pathfinder", "linear", 0.7),
            result("digits", "local(window=8)", 0.9),
            result("pathfinder", "linear", 0.8, seed=1),
        ],
        {"pathfinder": {"full": long_range.Cost(0.5, 40), "linear": long_range.Cost(0.125, 10.2)}},
    ).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert {len(row) for row in cells} == {10}
    local, full, linear = cells[2:]  # the order of TASKS
    assert full[3] == "not learned here (0.510 ± 0.010)" and full[9] == "71.40% (Transformer)"
    # Two seeds: their own error, 0.05, beside that of the rows they share.
    assert (
        linear[2:8] == ["2", "0.750 ± 0.051", "0.500", "125", "4.00", "10"]
        and linear[9] == "75.30% (Linear Transformer)"
    )
    assert local[1] == "local(window=8)" and local[5:8] == ["-", "-", "-"] and local[9] == "-"


def test_published_averages_are_the_paper_s():
    """The averages of the paper's table, which secondary sources give too."""
    averages = {"full": 54.39, "local": 46.06, "linear": 50.55, "performer": 51.41, "linformer": 51.36}
    averages |= {"lsh": 50.67, "block_sparse": 55.01}
    assert averages.keys() == long_range.PUBLISHED.keys()
    for kind, average in averages.items():
        _, accuracies = long_range.PUBLISHED[kind]
        assert sum(accuracies) / 5 == pytest.approx(average, abs=0.011)


def test_kinds_and_their_specs():
    assert {"full", "local", "linear"} <= set(long_range.bidirectional())
    assert long_range.split_kinds("full, local(window=8,block=4),linear") == [
        "full",
        "local(window=8,block=4)",
        "linear",
    ]
    assert set(long_range.SPECS) <= set(attention.KINDS)
    for spec in long_range.SPECS.values():
        attention.options(spec)
    for task in long_range.TASKS:
        assert (long_range.CONFIGS / f"{task}.py").is_file()


def test_times_are_taken_once_for_all_kinds_of_a_task(tmp_path, monkeypatch):
    taken = []

    def step_costs(wanted):
        taken.append([(run.task, run.kind) for run in wanted])
        return {run.kind: long_range.Cost(0.25, 30.0) for run in wanted}

    monkeypatch.setattr(long_range, "step_costs", step_costs)
    plan = lambda kinds, seeds=(0,): long_range.plan(["digits"], kinds, seeds, tmp_path, "", [])
    long_range.take_costs(plan(["full", "local"], (0, 1)), tmp_path)
    long_range.take_costs(plan(["local"]), tmp_path)
    long_range.take_costs(plan(["local", "linear"]), tmp_path)
    both = [[("digits", "full"), ("digits", "local")], [("digits", "local"), ("digits", "linear")]]
    assert taken == both
    assert long_range.known_costs(tmp_path) == {"digits": dict.fromkeys(("full", "local", "linear"), (0.25, 30.0))}


@pytest.mark.slow
def test_a_step_is_timed_on_the_longest_rows(tmp_path, one_device):
    small = ["training.steps=21", "model.layers=1", "model.width=32", "data.batch_size=8"]
    run, other = long_range.plan(["digits"], ["local", "linear"], [0], tmp_path, "", small)
    costs = long_range.step_costs([run, other], turns=1, steps=1)
    assert costs.keys() == {"local", "linear"} and min(cost.seconds for cost in costs.values()) > 0
    assert all(0.1 < cost.mebibytes < 1000 for cost in costs.values())


@pytest.mark.slow
def test_with_the_real_trainer(run_suite, monkeypatch):
    monkeypatch.setattr(runs, "TRAINER", ("-m", "fastlm.train"))
    small = ["training.steps=21", "model.layers=1", "model.width=32", "data.batch_size=8", "evaluation.split="]
    folder, _ = run_suite(["digits"], ["local"], overrides=small)
    (line,) = lines(folder)
    assert line["rows"] == 1000 and 0.1 < line["chance"] < 0.13 and 0 < line["accuracy"] < 1
    assert line["peak_memory"] > 200
