"""Distils a student, and says what the teacher gave it: beside the same student without one.

    launch/local.sh -m experiments.distill --config configs/distill/language_model.py
    launch/local.sh -m experiments.distill --config configs/distill/language_model.py --compare --seeds 0,1,2

Without --compare it is a training: what `fastlm.train` does with that config, resumable by the same command. With it,
every seed trains three students of one architecture and start: "distilled"; "alone", without the teacher for as many
steps; "alone, equal time", without it for as many steps as take the time of the distilled one (the two steps are
timed by turns, before anything else, and medians count). Each is a training in a process of its own; finished ones
are kept, stopped ones resume. The table has each student's score on the test split beside the teacher's, and the
differences paired by example and seed with their 95% intervals (`statistics.paired_over_seeds`). More overrides
(--config.training.steps=300) go to every run.
Left out: scores that no example has of its own (BLEU); their differences are given without an interval.
"""

import dataclasses
import functools
import json
import math
import statistics as numbers
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import runs
from experiments import steps as training_steps
from fastlm import command_line
from fastlm.compress import distill
from fastlm.errors import UserError
from fastlm.measurement import statistics, workers
from fastlm.measurement.answer_scores import answer_scores
from fastlm.parallel import mesh as meshes
from fastlm.training import quality, restore, workdir_files

FLAGS = flags.FLAGS
DISTILLED, ALONE, EQUAL_TIME = "distilled", "alone", "alone, equal time"

# metric -> an example's (value, weight), whose ratio of sums the metric is; higher is better but for bits.
EXAMPLES: dict[str, Callable[[Mapping[str, Any]], tuple[float, float]]] = {
    "bits_per_byte": lambda one: (one["nll"] / math.log(2), one["bytes"]),
    "exact_match": lambda one: (
        answer_scores([one["said"]], [[one["expected"], *one.get("or", ())]]).exact_match.value,
        1.0,
    ),
    "accuracy": lambda one: (float(one["said"] == one["label"]), 1.0),
    "loss": lambda one: (one["nll"], one["tokens"]),
}
FALLBACKS = ("rougeL", "bleu", "chrf")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A student of one seed: its name in the table, and what it is trained with."""

    name: str
    seed: int
    workdir: Path
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one model on the test split: the metric, and each example's value and weight where it has them."""

    metrics: dict[str, float]
    outputs: list[dict[str, Any]]


def arms(
    config: str, overrides: Sequence[str], seeds: Sequence[int], folder: Path, steps: int, equal_steps: int
) -> list[Arm]:
    """Lists what is trained, seeds outermost."""
    shared = ("--config", config, *(f"--config.{override}" for override in overrides))
    values = command_line.load_config(config, list(overrides))
    without = tuple(name for name in values["wrappers"] if name != distill.NAME)
    kinds = {
        DISTILLED: (f"--config.training.steps={steps}",),
        ALONE: (f"--config.wrappers={without!r}", f"--config.training.steps={steps}"),
        EQUAL_TIME: (f"--config.wrappers={without!r}", f"--config.training.steps={equal_steps}"),
    }
    return [
        Arm(
            name,
            seed,
            folder / name.replace(", ", "_").replace(" ", "_") / f"seed{seed}",
            (*shared, *more, f"--config.seed={seed}"),
        )
        for seed in seeds
        for name, more in kinds.items()
    ]


def step_seconds(config: str, overrides: Sequence[str], turns: int = 5, steps: int = 3) -> dict[str, float]:
    """Returns the median seconds of a step with and without the teacher, timed by turns."""
    values = command_line.load_config(config, list(overrides))
    without = values | {"wrappers": tuple(name for name in values["wrappers"] if name != distill.NAME)}
    with tempfile.TemporaryDirectory() as unused:
        each = {
            name: training_steps.TrainingStep(one, Path(unused))
            for name, one in ((DISTILLED, values), (ALONE, without))
        }
        for step in each.values():
            for _ in range(2):  # let the allocator settle
                step()
        timers = {name: functools.partial(workers.timed, step, steps) for name, step in each.items()}
        taken = workers.take_turns(timers, turns)
    return {name: numbers.median(turn["seconds"] for turn in turns) for name, turns in taken.items()}


def score_of(workdir: Path) -> Score:
    """Returns what a finished training scored."""
    metrics = json.loads((workdir / "result.json").read_text())["metrics"]
    path = workdir / "predictions.jsonl"
    outputs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return Score(metrics, outputs)


def score_of_teacher(config: str, overrides: Sequence[str]) -> Score:
    """Returns what the first teacher scores on the student's test split."""
    values = command_line.load_config(config, list(overrides))
    mesh = meshes.share_weights(1)
    section = values[distill.NAME]
    restored = restore.restore(section["teachers"][0], mesh, step=section.get("step") or None)
    about = restored.about | {
        "config": restored.about["config"] | {"data": values["data"], "evaluation": values["evaluation"]}
    }
    restored = dataclasses.replace(restored, about=about)
    asked = quality.Asked(batch_size=values["evaluation"]["batch_size"] or values["data"]["batch_size"])
    scored = quality.score(restored, mesh, asked)
    return Score(scored.metrics, scored.outputs)


def metric_of(scores: Sequence[Score]) -> str:
    """Returns what these models are compared by.

    Raises:
      UserError: the task has no final score.
    """
    names = [name for name in (*EXAMPLES, *FALLBACKS) if all(name in score.metrics for score in scores)]
    if not names:
        raise UserError("--compare: these runs have no score in common; set config.evaluation.final_split")
    return names[0]


def difference(metric: str, first: Sequence[Score], second: Sequence[Score]) -> str:
    """Returns first - second over seeds, with its 95% interval where examples have scores of their own."""
    if metric not in EXAMPLES or not all(score.outputs for score in (*first, *second)):
        means = [numbers.fmean(score.metrics[metric] for score in scores) for scores in (first, second)]
        return f"{means[0] - means[1]:+.4f} (no interval)"
    values = [[[EXAMPLES[metric](one) for one in score.outputs] for score in scores] for scores in (first, second)]
    one, other = (np.array(part)[..., 0] for part in values)
    found = statistics.paired_over_seeds(one, other, np.array(values[0])[0, :, 1])
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def table(
    found: Mapping[str, Sequence[Score]], teacher: Score, counts: Mapping[str, int], seconds: Mapping[str, float]
) -> str:
    """Returns the comparison as Markdown.

    Args:
      found: scores by arm, one for each seed.
      counts: steps of each arm; seconds: of a step with and without the teacher.
    """
    metric = metric_of([teacher, *(score for scores in found.values() for score in scores)])
    lines = [
        f"| | {metric} | of the teacher's | steps | s/step | distilled less this |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines.append(f"| teacher | {teacher.metrics[metric]:.4f} | 1 | | | |")
    for name, scores in found.items():
        values = [score.metrics[metric] for score in scores]
        spread = f" (seeds: {', '.join(f'{value:.4f}' for value in values)})" if len(values) > 1 else ""
        less = "" if name == DISTILLED else difference(metric, found[DISTILLED], scores)
        step = seconds[DISTILLED if name == DISTILLED else ALONE]
        lines.append(
            f"| {name} | {numbers.fmean(values):.4f}{spread} | {numbers.fmean(values) / teacher.metrics[metric]:.3f} "
            f"| {counts[name]} | {step:.3f} | {less} |"
        )
    return "\n".join(lines)


def compare(config: str, overrides: Sequence[str], seeds: Sequence[int], folder: Path, at_once: int = 1) -> str:
    """Trains what is missing and returns the table, which is also written to results.md.

    Raises:
      UserError: some runs did not finish; or the folder holds runs with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    steps = command_line.load_config(config, list(overrides))["training"]["steps"]
    seconds = _once(
        folder / "steps.json", {"config": config, "overrides": list(overrides)}, lambda: step_seconds(config, overrides)
    )
    equal = max(1, round(steps * seconds[DISTILLED] / seconds[ALONE]))
    print(f"a step takes {seconds[DISTILLED]:.3f} s with the teacher, {seconds[ALONE]:.3f} s without", flush=True)
    wanted = arms(config, overrides, seeds, folder, steps, equal)
    missing = [arm for arm in wanted if not (arm.workdir / "result.json").is_file()]
    failed = []
    for place, outcome in runs.train_each([(arm.arguments, arm.workdir) for arm in missing], at_once):
        arm = missing[place]
        print(f"{arm.name}, seed {arm.seed}: {'failed' if outcome is None else outcome.metrics}", flush=True)
        failed += [arm] if outcome is None else []
    if failed:
        logs = ", ".join(str(runs.log_of(arm.workdir)) for arm in failed)
        raise UserError(f"{len(failed)} of {len(wanted)} runs did not finish: see {logs}")
    found: dict[str, list[Score]] = {}
    for arm in wanted:
        found.setdefault(arm.name, []).append(score_of(arm.workdir))
    text = table(
        found, score_of_teacher(config, overrides), {DISTILLED: steps, ALONE: steps, EQUAL_TIME: equal}, seconds
    )
    workdir_files.write_whole(folder / "results.md", text + "\n")
    return text


def _once(path: Path, settings: dict[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measures, or reads what was measured with the same settings."""
    known = json.loads(path.read_text()) if path.is_file() else None
    if known and known["settings"] != settings:
        raise UserError(f"{path}: these runs have other settings ({known['settings']}); name another --folder")
    if known is None:
        known = {"settings": settings, "seconds": measure()}
        workdir_files.write_whole(path, json.dumps(known, indent=1) + "\n")
    return known["seconds"]


def define_flags() -> None:
    """Defines those of fastlm.train, by importing it, and more; not on import, for experiments share names."""
    from fastlm import train  # noqa: F401

    flags.DEFINE_bool("compare", False, "train the same student without the teacher too, and compare")
    flags.DEFINE_list("seeds", ["0"], "with --compare: seeds of each")
    flags.DEFINE_string("folder", "", "with --compare: where runs and results.md lie; default runs/compared/<config>")
    flags.DEFINE_integer("at_once", 1, "with --compare: trainings side by side", lower_bound=1)


def main() -> None:
    """Trains one student, or compares."""
    from fastlm import train

    config = FLAGS.config
    values = command_line.load_config(config, command_line.overrides())
    if distill.NAME not in values["wrappers"]:
        raise UserError(f"config.wrappers: has no '{distill.NAME}': this config distils nothing; use fastlm.train")
    if not FLAGS.compare:
        train.main()
        return
    folder = Path(FLAGS.folder or Path("runs/compared") / Path(config.partition(":")[0]).stem)
    print(compare(config, command_line.overrides(), [runs.seed(text) for text in FLAGS.seeds], folder, FLAGS.at_once))


if __name__ == "__main__":
    define_flags()
    flags.mark_flag_as_required("config")
    command_line.main(main, overridable=True)
