"""Muon against AdamW: how many steps to the same loss?

    python -m experiments.benchmarks.optimizers --runs=adamw:0.002,muon:0.01 --seeds=0,1,2 --steps=600 \
        --out=optimizers.json --plot=optimizers.png

Trains `--config` once for each optimizer, rate and seed, all else equal, on the corpus of the config, and compares the
curves of validation loss. The target is the loss that every seed of the first of `--runs` reached at its end; the
figure is the first step at which a run is below it, interpolated between evaluations. Nothing is tuned here: a fair
comparison names several rates for each optimizer and compares the best of each.
With lm_small, a run of 600 steps takes about four minutes on two quiet cores, so the command above takes half an hour.
A finished run is one file in `--folder`; the same command goes on where it stopped.
"""

import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from fastlm import command_line
from fastlm.errors import UserError
from fastlm.training import build, loop, workdir_files

FLAGS = flags.FLAGS
Curve = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its curve is (step, validation loss in nats per token)."""

    name: str
    seed: int
    curve: Curve

    @property
    def final(self) -> float:
        """Loss at the last step."""
        return self.curve[-1][1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer at one rate, over its seeds.

    Attributes:
      final, final_error: mean of the last loss, and its standard error; None for a single seed.
      steps, steps_error: the same of the steps to the target; None also if a seed never got there.
    """

    name: str
    seeds: int
    final: float
    final_error: float | None
    steps: float | None
    steps_error: float | None


def settings(config: dict[str, Any], run: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Returns `config` for one run, "muon:0.01".

    Raises:
      UserError: `run` is no optimizer and rate.
    """
    name, _, rate = run.partition(":")
    try:
        peak = float(rate)
    except ValueError:
        raise UserError(f"--runs: '{run}' is not optimizer:rate, as in muon:0.01") from None
    changes = {
        "optimizer": {"name": name},
        "schedule": {"peak": peak},
        "training": {"steps": steps},
        "evaluation": {"every": every, "final_split": ""},
        "checkpoint": {"every": steps, "keep": 1},
        "logging": {"tensorboard": False},
        "sample": {"prompts": ()},
    }
    return config | {section: config[section] | values for section, values in changes.items()} | {"seed": seed}


def train(config: dict[str, Any], name: str, folder: Path) -> Run | None:
    """Trains one run, or reads its file if it is there; None when it was asked to stop.

    Raises:
      UserError: the file is of a run with other settings.
    """
    path = folder / f"{name.replace(':', '-')}-seed{config['seed']}.json"
    described = json.loads(json.dumps(config))
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved["config"] != described:
            raise UserError(f"{path} is of a run with other settings; name another --folder, or delete it")
        return Run(name, config["seed"], [(step, loss) for step, loss in saved["curve"]])
    workdir = path.with_suffix("")
    experiment = build.build(config, workdir)
    if loop.run(experiment).status != "finished":
        return None
    curve = read_curve(workdir / "metrics.jsonl", f"{experiment.evaluation.split}/loss")
    workdir_files.write_whole(path, json.dumps({"config": described, "curve": curve}))
    shutil.rmtree(workdir)
    return Run(name, config["seed"], curve)


def read_curve(path: Path, metric: str) -> Curve:
    """Returns (step, value) of a metric of a run's JSONL file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["step"], row[metric]) for row in rows if metric in row]


def steps_to(curve: Curve, target: float) -> float | None:
    """Returns the first step with a loss of `target` or less, linear between points; None if there is none."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return None


def compare(runs: Sequence[Run]) -> tuple[float, list[Row]]:
    """Returns the target loss, which every seed of the first run's name reached, and a row for each name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    target = max(run.final for run in groups[runs[0].name])
    rows = []
    for name, group in groups.items():
        steps = [steps_to(run.curve, target) for run in group]
        reached = [step for step in steps if step is not None]
        mean, error = _mean_and_error(reached) if len(reached) == len(group) else (None, None)
        rows.append(Row(name, len(group), *_mean_and_error([run.final for run in group]), mean, error))
    return target, rows


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def table(target: float, rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown, with the steps relative to the first of them."""
    lines = [
        f"| optimizer:rate | seeds | final loss | steps to {target:.4f} | relative |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        relative = "-" if row.steps is None else f"{row.steps / rows[0].steps:.2f}"
        final, steps = _shown(row.final, row.final_error, 4), _shown(row.steps, row.steps_error, 0)
        lines.append(f"| {row.name} | {row.seeds} | {final} | {steps} | {relative} |")
    return "\n".join(lines)


def _shown(mean: float | None, error: float | None, digits: int) -> str:
    if mean is None:
        return "not reached"
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def draw(runs: Iterable[Run], target: float, path: str | Path) -> None:
    """Draws every curve, one colour for each name, and the target as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.8), dpi=150)
    colors: dict[str, str] = {}
    for run in runs:
        label = None if run.name in colors else run.name
        color = colors.setdefault(run.name, f"C{len(colors)}")
        axes.plot(*zip(*run.curve), color=color, label=label, linewidth=1)
    axes.axhline(target, color="gray", linestyle=":", label="target")
    axes.set(xlabel="step", ylabel="validation loss (nats per token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def define_flags() -> None:
    """Defines the flags; not on import, for benchmarks that stand side by side share names."""
    flags.DEFINE_string("config", "configs/lm_small.py", "what to train; override with --config.section.key=value")
    flags.DEFINE_list("runs", ["adamw:0.002", "muon:0.01"], "optimizer:peak rate; the first is the baseline")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of each")
    flags.DEFINE_integer("steps", 600, "optimizer steps of a run", lower_bound=1)
    flags.DEFINE_integer("every", 20, "steps between evaluations", lower_bound=1)
    flags.DEFINE_string("folder", "runs/optimizers", "where one file for each finished run lies")
    flags.DEFINE_string("out", "", "JSON file for the rows of the table")
    flags.DEFINE_string("plot", "", "PNG file for the curves")


def main() -> None:
    """Trains what is missing, then reports on all runs."""
    base = command_line.load_config(FLAGS.config, command_line.overrides())
    runs = []
    for seed in FLAGS.seeds:  # seeds outside: after a third of the time there is a first comparison
        for name in FLAGS.runs:
            run = train(settings(base, name, int(seed), FLAGS.steps, FLAGS.every), name, Path(FLAGS.folder))
            if run is None:
                return
            runs.append(run)
    target, rows = compare(runs)
    print(table(target, rows))
    if FLAGS.out:
        summary = {"target": target, "rows": [dataclasses.asdict(row) for row in rows]}
        workdir_files.write_whole(Path(FLAGS.out), json.dumps(summary, indent=1) + "\n")
    if FLAGS.plot:
        draw(runs, target, FLAGS.plot)


if __name__ == "__main__":
    define_flags()
    command_line.main(main, overridable=True)
