"""Zeros and smaller models out of a trained one, from the command line: what is written, and how training goes on."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import runs
from fastlm.models import ModelConfig, abstract
from fastlm.ops.paths import flatten
from fastlm.parallel import mesh as meshes
from fastlm.search import clock
from fastlm.training import build, loop, restore
from tests.entry_points import call, refuses


@pytest.fixture
def run(tiny_config, tmp_path, one_device):
    """The workdir of a small trained model."""
    loop.run(build.build(tiny_config, tmp_path / "run"), say=lambda text: None)
    return tmp_path / "run"


def rows(text):
    """The cells of a printed table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def zeros(workdir):
    leaves = flatten(restore.restore(workdir, meshes.make()).params)
    return {path: np.asarray(leaf) == 0 for path, leaf in leaves.items() if re.search("attention/|feed_forward/", path)}


def test_zeros_at_once_and_training_that_keeps_them(run, tiny_config, tmp_path):
    little = ("--workdir", run, "--batches", "2", "--score_batches", "1")
    shown = call("experiments.sparsify", *little, "--score", "magnitude,wanda,taylor", "--sparsity", "0.5,1")
    table = rows(shown.out)
    assert shown.status == 0 and [row[2] for row in table] == ["", "0.500", "1.000"] + ["0.500", "1.000"] * 2
    assert len({row[3] for row in table if row[2] == "1.000"}) == 1  # nothing is left to differ
    assert len({row[3] for row in table}) >= 4
    target = tmp_path / "zeros"
    made = call("experiments.sparsify", *little, "--score", "wanda", "--sparsity", "0.25", "--to", target)
    assert made.status == 0 and "weights in" in made.out and f"wrote step 0 to {target}" in made.out
    before = zeros(target)
    matrices = {path: zero for path, zero in before.items() if zero.ndim == 2}
    assert {round(float(zero.mean()), 3) for zero in matrices.values()} == {0.25}
    assert json.loads((target / "checkpoints/0/about/metadata").read_text())["made_from"]["step"] == 12
    tiny_config |= {"init": {"source": str(target)}, "wrappers": ("pruned",), "pruned": {"method": "kept"}, "model": {}}
    loop.run(build.build(tiny_config, tmp_path / "after"), say=lambda text: None)
    for path, zero in zeros(tmp_path / "after").items():
        if path in matrices:
            np.testing.assert_array_equal(zero, before[path])
    tickets = tmp_path / "tickets"
    call("experiments.sparsify", *little, "--sparsity", "0.5", "--rewind", "8", "--to", tickets)
    early, late, found = (
        flatten(restore.restore(one, meshes.make(), step=step).params)
        for one, step in [(run, 8), (run, 12), (tickets, 0)]
    )
    path = "layers/0/feed_forward/up"
    kept = np.asarray(found[path]) != 0
    np.testing.assert_array_equal(np.asarray(found[path])[kept], np.asarray(early[path])[kept])
    assert np.abs(np.asarray(late[path])[kept]).min() >= np.abs(np.asarray(late[path])[~kept]).max()


def test_a_smaller_model_is_written_and_goes_on(run, tmp_path):
    little, target = ("--workdir", run, "--batches", "2", "--score_batches", "1"), tmp_path / "small"
    shown = call("experiments.prune", *little, "--feed_forward_width", "32", "--heads", "1", "--score", "wanda,random")
    assert shown.status == 0 and [row[0] for row in rows(shown.out)] == ["(whole)", "wanda", "random"]
    made = call(
        "experiments.prune", *little, "--width", "8", "--feed_forward_width", "32", "--score", "taylor", "--to", target
    )
    restored = restore.restore(target, meshes.make())
    cfg = restored.model.cfg
    assert made.status == 0 and (cfg.width, cfg.layer(0).feed_forward_width) == (8, 32)
    jax.tree.map(
        lambda leaf, shape: np.testing.assert_equal(leaf.shape, shape.shape), restored.params, abstract(cfg)[0]
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(restored.params))
    assert f"{count:,} of" in made.out
    assert "loss" in call("evaluate", "--workdir", target).out


def test_what_cannot_be_cut_is_one_line(run, tmp_path):
    sparsify, prune = (["experiments." + name, "--workdir", run] for name in ("sparsify", "prune"))
    refuses("--score: no score 'wand'; did you mean 'wanda'", *sparsify, "--score", "wand")
    refuses("--sparsity: '1.5' is no share", *sparsify, "--sparsity", "1.5")
    refuses("--to: writes one model", *sparsify, "--sparsity", "0.5,0.7", "--to", tmp_path / "x")
    refuses("--paths: 'attention/qq' matches no parameter path", *sparsify, "--paths", "attention/qq")
    refuses("--to: ", *sparsify, "--to", run)
    refuses("nothing to cut", *prune)
    refuses("--heads: 9 cannot be kept of 2", *prune, "--heads", "9")
    refuses("--layers: '7': give 'evenly'", *prune, "--layers", "7")
    refuses("--layer_count: goes with --layers", *prune, "--layer_count", "1")
    refuses("--layer_count: 3 of 1 layers cannot be kept", *prune, "--layers", "influence", "--layer_count", "3")
    refuses("none.txt", *prune, "--heads", "1", "--source", "text:" + str(tmp_path / "none.txt"))


def test_zeros_take_a_bit_on_disk_and_the_others_make_up_for_them(run, tmp_path):
    little = ("--workdir", run, "--batches", "2", "--score_batches", "1", "--sparsity", "0.75")
    shown = call("experiments.sparsify", *little, "--score", "surgeon,fisher", "--allocation", "2:4,global", "--update")
    assert shown.status == 0 and [row[2] for row in rows(shown.out)[1:]] == ["0.500", "0.750"] * 2
    call("experiments.sparsify", *little, "--to", tmp_path / "masked")
    call("experiments.sparsify", *little, "--update", "--to", tmp_path / "updated")
    call("experiments.sparsify", "--workdir", tmp_path / "masked", "--sparsity", "0", "--to", tmp_path / "again")
    masked, updated, again = (zeros(tmp_path / name) for name in ("masked", "updated", "again"))
    for path, zero in masked.items():
        np.testing.assert_array_equal(zero, updated[path])
        np.testing.assert_array_equal(zero, again[path])
    about = json.loads((tmp_path / "masked/checkpoints/0/about/metadata").read_text())
    stored = ModelConfig.from_json(json.dumps(about["model"]))
    # Files of so small a model are mostly names of their parts; what counts are the arrays in them.
    size = lambda cfg: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract(cfg)[0]))
    assert size(stored.in_use()) - size(stored) == sum(4 * zero.sum() - -(-zero.size // 8) for zero in masked.values())
    assert all(text.startswith("sparse(ones=") for _, text in about["model"]["formats"])
    assert not about["config"]["model"]["formats"]
    refuses(
        "--update: fits the newest weights",
        "experiments.sparsify",
        *little,
        "--update",
        "--rewind",
        "8",
        "--to",
        tmp_path / "x",
    )


def test_thin_matrices_from_a_run_to_training_and_back(run, tiny_config, tmp_path):
    little = ("--workdir", run, "--batches", "2", "--score_batches", "1", "--multiple", "2")
    shown = call(
        "experiments.low_rank", *little, "--method", "svd,fisher", "--share", "0.5,0.8", "--allocation", "uniform,size"
    )
    table = rows(shown.out)
    assert shown.status == 0 and [row[2] for row in table[1:]] == ["0.50", "0.80"] * 4
    assert len({row[4] for row in table}) > 4
    target = tmp_path / "thin"
    made = call("experiments.low_rank", *little, "--share", "0.5", "--to", target)
    assert made.status == 0 and "low_rank(rank=" in made.out and f"wrote step 0 to {target}" in made.out
    found = restore.restore(target, meshes.make())
    assert found.model.cfg.formats and set(flatten(found.params)) == set(abstract(found.model.cfg)[1])
    tiny_config |= {"init": {"source": str(target)}, "model": {}}
    loop.run(build.build(tiny_config, tmp_path / "after"), say=lambda text: None)
    after = restore.restore(tmp_path / "after", meshes.make())
    assert after.model.cfg.formats == found.model.cfg.formats
    moved = [not np.array_equal(a, b) for a, b in zip(flatten(found.params).values(), flatten(after.params).values())]
    assert all(moved)
    fused = restore.restore(tmp_path / "after", meshes.make(), fused=True)
    tokens = np.arange(8)[None]
    np.testing.assert_allclose(
        fused.model.apply(fused.params, tokens)[0], after.model.apply(after.params, tokens)[0], atol=1e-4
    )
    refuses("has factors already", "experiments.low_rank", "--workdir", target)
    refuses("--method: no method 'fsher'", "experiments.low_rank", "--workdir", run, "--method", "fsher")
    refuses("--share: 0.01 of", "experiments.low_rank", *little, "--share", "0.01")


def test_what_each_part_is_worth_is_read_once_and_drawn(run, tmp_path):
    target = tmp_path / "readings"
    little = ("--workdir", run, "--batches", "1", "--score_batches", "2", "--to", target)
    first = call("experiments.sensitivity", *little, "--ways", "feed_forward")
    assert first.status == 0 and "layers/0/feed_forward feed_forward -50%" in first.out
    again = call("experiments.sensitivity", *little, "--ways", "feed_forward,heads")
    assert again.status == 0 and "feed_forward -50%" not in again.out and "attention heads -50%" in again.out
    found = json.loads((target / "readings.json").read_text())["readings"]
    assert len(found) == len({(row["part"], row["way"]) for row in found}) == 2
    assert (target / "sensitivity.png").exists() and "layers/0" in (target / "sensitivity.html").read_text()
    refuses("holds readings with another batches", "experiments.sensitivity", *little[:3], "2", *little[4:])
    refuses("--ways: no 'head'", "experiments.sensitivity", *little, "--ways", "head")
    refuses("--levels: give shares between", "experiments.sensitivity", *little, "--levels", "1")


@pytest.fixture
def two_layers(tiny_config, tmp_path, one_device):
    """The workdir of a trained model that has two layers, and what there is to read of them."""
    tiny_config["model"] |= {"layers": 2, "heads": 4, "feed_forward_width": 64}
    loop.run(build.build(tiny_config, tmp_path / "run"), say=lambda text: None)
    little = ("--batches", "1", "--score_batches", "2", "--levels", "0.25,0.5,0.75", "--to", tmp_path / "readings")
    call("experiments.sensitivity", "--workdir", tmp_path / "run", *little, "--ways", "heads,feed_forward,layer")
    return tmp_path / "run", tmp_path / "readings/readings.json"


def test_sizes_of_layers_follow_a_budget(two_layers, tmp_path, monkeypatch):
    run, readings = two_layers
    given = ("--workdir", run, "--readings", readings, "--batches", "1", "--score_batches", "1", "--score", "fisher")
    made = call("experiments.prune", *given, "--budget", "0.6", "--to", tmp_path / "cut")
    assert made.status == 0 and "readings add up to" in made.out
    before, after = (restore.restore(one, meshes.make()) for one in (run, tmp_path / "cut"))
    numbers = lambda one: sum(leaf.size for path, leaf in flatten(one.params).items() if path.startswith("layers/"))
    assert 0.3 < numbers(after) / numbers(before) <= 0.6
    units = lambda cfg: 20 + sum(cfg.layer(i).heads + cfg.layer(i).feed_forward_width for i in range(cfg.layers))
    slow = lambda cfg, compute: lambda load: [units(cfg)]  # a clock that goes by heads and units
    monkeypatch.setattr(clock, "runner", slow)
    shown = call("experiments.prune", *given, "--speed", "1.5")
    predicted, measured = map(float, re.findall(r"([\d.]+) of the time predicted, ([\d.]+) measured", shown.out)[-1])
    assert shown.status == 0 and predicted == pytest.approx(measured, abs=2e-3) and measured <= 1.03 / 1.5
    refuses("--speed: 99.0 is not to be had", "experiments.prune", *given, "--speed", "99")
    refuses("--budget: it leaves a stack without layers", "experiments.prune", *given, "--budget", "0.00000001")
    refuses("--heads: is decided by --readings", "experiments.prune", *given, "--heads", "2")
    refuses("readings of another architecture", "experiments.prune", *given[:1], tmp_path / "cut", *given[2:])
    refuses("cannot be read; write it with", "experiments.prune", *given[:3], tmp_path / "none.json")


def test_closed_gates_are_cut_out_of_a_run_that_was_stopped(tiny_config, tmp_path, one_device, monkeypatch):
    tiny_config |= {"wrappers": ("gated",), "gated": {"target": "linear(start=0.0, end=0.6, until=0.5)", "rate": 5.0}}
    tiny_config["optimizer"] = tiny_config["optimizer"] | {"groups": (("gated", {"rate": 1000.0, "decay": 0.0}),)}

    def train(name, stop_at=None):
        monkeypatch.setattr(loop.StopRequest, "now", lambda self, step: step == stop_at)
        return loop.run(build.build(tiny_config, tmp_path / name), say=lambda text: None)

    straight = train("straight")
    assert train("twice", stop_at=7).status == "interrupted"
    twice = train("twice")
    jax.tree.map(np.testing.assert_array_equal, straight.state.params, twice.state.params)
    jax.tree.map(np.testing.assert_array_equal, straight.state.compression, twice.state.compression)
    run = tmp_path / "twice"
    shown = call("experiments.prune", "--workdir", run, "--dead", "--score_batches", "1")
    whole, cut = (row[1:] for row in rows(shown.out))
    assert shown.status == 0 and whole == cut
    made = call("experiments.prune", "--workdir", run, "--dead", "--to", tmp_path / "cut")
    assert made.status == 0
    before, after = (restore.restore(one, meshes.make()) for one in (run, tmp_path / "cut"))
    tokens = np.arange(8)[None]
    np.testing.assert_allclose(
        before.model.apply(before.params, tokens)[0], after.model.apply(after.params, tokens)[0], atol=1e-5
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(after.params)) < sum(
        leaf.size for leaf in jax.tree.leaves(before.params)
    )
    refuses("--heads: is decided by --dead", "experiments.prune", "--workdir", run, "--dead", "--heads", "1")


def test_rounds_go_on_where_they_were(two_layers, tmp_path, monkeypatch):
    """Commands are played: what a cut is, was made before, and the second training fails once."""
    (run, readings), commands, fails = two_layers, [], [True]
    made = ("--workdir", run, "--readings", readings, "--batches", "1", "--score", "fisher")
    call("experiments.prune", *made, "--budget", "0.7", "--to", tmp_path / "a cut")

    def played(command, check):
        commands.append(command[2])
        target = next(Path(one.partition("=")[2]) for one in command if one.startswith("--to="))
        if command[2] == "experiments.prune":
            assert target.name == "cut.partial" and not target.exists()
            shutil.copytree(tmp_path / "a cut", target)
        return subprocess.CompletedProcess(command, 0)

    def trained(arguments, workdir):
        commands.append("train")
        if workdir.parent.name == "round2" and fails:
            return fails.clear()
        assert any(one.startswith("--config.init.source=") and one.endswith("/cut") for one in arguments)
        shutil.copytree(tmp_path / "a cut", workdir)
        (workdir / "result.json").write_text("{}")
        return runs.Outcome({}, 0.0)

    monkeypatch.setattr(subprocess, "run", played)
    monkeypatch.setattr(runs, "train", trained)
    given = ("--config", "configs/lm_tiny.py", "--from", run, "--folder", tmp_path / "rounds", "--batches", "1")
    given += ("--test_batches", "1", "--budgets", "0.8,0.6")
    refuses("the training did not finish", "experiments.prune_rounds", *given)
    of_a_round = ["experiments.sensitivity", "experiments.prune", "train"]
    assert commands == of_a_round * 2
    done = call("experiments.prune_rounds", *given)
    assert done.status == 0 and commands == [*of_a_round * 2, "train"]
    table = rows((tmp_path / "rounds/results.md").read_text())
    assert [row[0] for row in table] == ["whole", "round 1", "round 2"] and float(table[1][2]) <= 0.7
    refuses("its rounds have another budgets", "experiments.prune_rounds", *given[:-1], "0.9")
    refuses("takes more than a third; put 0.667", "experiments.prune_rounds", *given[:-1], "0.5")


@pytest.mark.slow
def test_rounds_in_processes_of_their_own(two_layers, tmp_path):
    run = two_layers[0]
    text = (run / "config.json").read_text()
    config = tmp_path / "config.py"
    config.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    values = json.loads({text!r})\n    values.update(model={{}}, mesh={{}})\n    return ConfigDict(values)\n"
    )
    given = ("--config", config, "--from", run, "--folder", tmp_path / "rounds", "--budgets", "0.8,0.6")
    little = ("--batches", "1", "--levels", "0.5,0.75", "--score_batches", "2", "--test_batches", "1")
    done = call("experiments.prune_rounds", *given, *little)
    assert done.status == 0, done
    shares = [float(row[2]) for row in rows((tmp_path / "rounds/results.md").read_text())]
    assert shares[0] == 1 and shares[1] <= 0.8 and shares[2] <= 0.6
    assert (tmp_path / "rounds/round2/trained/result.json").exists()
