"""Cuts a trained model, trains what is left, and cuts again: rounds of at most a third each, as one resumable command.

    launch/local.sh -m experiments.prune_rounds --config configs/prune/rounds.py --from runs/lm_small \\
        --budgets 0.7,0.5 --folder runs/rounds

Every round reads how much the loss depends on heads and units of each layer (experiments.sensitivity), cuts
to its budget, a share of the numbers that the first model's layers have (experiments.prune --readings), and trains with
the config, which starts from the cut; with the first model for a teacher, if the config says so. Each of these is a
process of its own; what is finished stays, and what was stopped goes on, when the same command is given again. Config
overrides (--config.training.steps=200) go to every training. results.md has each round's score on the test split before
and after its training.
Paper: Minitron (arXiv 2407.14679), where more than half was only to be had in rounds.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import calibration, costs, runs
from fastlm import command_line
from fastlm.errors import UserError
from fastlm.parallel import mesh as meshes
from fastlm.search import sensitivity
from fastlm.training import quality, restore, workdir_files

FLAGS = flags.FLAGS
MOST = 1 / 3  # of what is there, that a round may take


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("config", None, "of the training of each round; override with --config.section.key=value")
    flags.DEFINE_string("from", None, "the trained model to begin with")
    flags.DEFINE_list("budgets", ["0.7", "0.5"], "share of the numbers of the first model's layers, of each round")
    flags.DEFINE_list("ways", ["heads", "feed_forward"], "what may be cut; 'layer' too")
    flags.DEFINE_list("levels", ["0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875"], "that are read")
    flags.DEFINE_string("score", "fisher", "which decides between the units of a layer")
    flags.DEFINE_integer("score_batches", 8, "of the validation split, that readings look at", lower_bound=2)
    flags.DEFINE_integer("test_batches", 0, "of the test split, that the table is of; 0 for all", lower_bound=0)
    flags.DEFINE_string("folder", None, "where rounds lie")
    calibration.define_flags()


def budgets() -> list[float]:
    """Returns the budget of each round.

    Raises:
      UserError: they do not fall, or too fast.
    """
    found = calibration.shares(FLAGS.budgets, "--budgets")
    for before, after in zip([1.0, *found], found):
        if not 0 < after < before:
            raise UserError(f"--budgets: {after} is not less than {before} before it")
        if after < before * (1 - MOST) - 1e-6:
            between = round(before * (1 - MOST), 3)
            raise UserError(f"--budgets: {after} after {before} takes more than a third; put {between} between them")
    return found


def run(module: str, arguments: Sequence[str]) -> None:
    """Runs a command of this project, which prints what it prints.

    Raises:
      UserError: it failed.
    """
    print(f"{module} {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode:
        raise UserError(f"{module} failed, see above; mend that and give the same command again")


def same_as_before(folder: Path, settings: dict[str, Any]) -> None:
    """Keeps what the rounds of a folder are made with.

    Raises:
      UserError: they were made with something else.
    """
    path = folder / "settings.json"
    if not path.is_file():
        workdir_files.write_whole(path, json.dumps(settings, indent=1) + "\n")
    elif (known := json.loads(path.read_text())) != settings:
        other = ", ".join(name for name in settings if known.get(name) != settings[name])
        raise UserError(f"{folder}: its rounds have another {other}; name another --folder, or give the same again")


def one_round(folder: Path, before: str, share: float, config: str, overrides: Sequence[str]) -> Path:
    """Reads, cuts and trains; returns the workdir of the trained model.

    Args:
      before: workdir of the model to cut.
      share: of its layers' numbers, that is kept.
    """
    cut, trained, partial = folder / "cut", folder / "trained", folder / "cut.partial"
    data = [f"--batches={FLAGS.batches}", f"--split={FLAGS.split}", *(f"--source={source}" for source in FLAGS.source)]
    if not cut.is_dir():
        readings = folder / "readings"
        given = [f"--ways={','.join(FLAGS.ways)}", f"--levels={','.join(FLAGS.levels)}"]
        given += [f"--score_batches={FLAGS.score_batches}", f"--to={readings}", f"--workdir={before}", *data]
        run("experiments.sensitivity", given)
        shutil.rmtree(partial, ignore_errors=True)
        given = [f"--readings={readings / sensitivity.FILE}", f"--budget={share:.6f}", f"--score={FLAGS.score}"]
        run("experiments.prune", [f"--workdir={before}", *given, f"--to={partial}", *data])
        partial.rename(cut)
    if not (trained / "result.json").is_file():
        print(f"training, see {runs.log_of(trained)}", flush=True)
        if runs.train([f"--config={config}", *overrides, f"--config.init.source={cut}"], trained) is None:
            raise UserError(f"the training did not finish: see {runs.log_of(trained)}; give the same command again")
    return trained


def main() -> None:
    """Runs all rounds, and writes the table."""
    first, folder, config = FLAGS["from"].value, FLAGS.folder, FLAGS.config
    if not first or not folder:
        raise UserError("--from, --folder: name a trained model, and where rounds should lie")
    wanted, overrides = budgets(), [f"--config.{override}" for override in command_line.overrides()]
    folder = Path(folder).expanduser()
    about = {name: FLAGS[name].value for name in ("budgets", "ways", "levels", "score", "source", "split", "batches")}
    same_as_before(folder, {"from": first, "config": config, "overrides": overrides, **about})
    mesh = meshes.alone()
    jax.set_mesh(mesh)
    asked = quality.Asked(tuple(FLAGS.source), batches=FLAGS.test_batches)
    total = sensitivity.numbers_of_layers(restore.restore(first, mesh).model.cfg)
    rows, now = [_row("whole", total, total, [_metric(first, mesh, asked)])], first
    for number, budget in enumerate(wanted, 1):
        there = sensitivity.numbers_of_layers(restore.restore(now, mesh).model.cfg)
        own = folder / f"round{number}"
        now = str(one_round(own, now, budget * total / there, config, overrides))
        cfg = restore.restore(now, mesh).model.cfg
        scores = [_metric(str(own / "cut"), mesh, asked), _metric(now, mesh, asked)]
        rows.append(_row(f"round {number}", sensitivity.numbers_of_layers(cfg), total, scores))
    name = scores[0][0]
    text = "\n".join([f"| | numbers of layers | share | {name}, cut | trained |", "|---|---:|---:|---:|---:|", *rows])
    workdir_files.write_whole(folder / "results.md", text + "\n")
    print(text)
    print(f"the smallest model: {now}")


def _metric(workdir: str, mesh: Any, asked: quality.Asked) -> tuple[str, float]:
    metrics = quality.score(restore.restore(workdir, mesh), mesh, asked).metrics
    name = next(name for name in costs.SHOWN if name in metrics)
    return name, metrics[name]


def _row(name: str, own: int, total: int, scores: Sequence[tuple[str, float]]) -> str:
    cells = [f"{value:.4f}" for _, value in scores]
    return "| " + " | ".join([name, f"{own:,}", f"{own / total:.3f}", *([""] * (2 - len(cells))), *cells]) + " |"


if __name__ == "__main__":
    define_flags()
    flags.mark_flag_as_required("config")
    command_line.main(main, overridable=True)
