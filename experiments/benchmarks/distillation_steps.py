"""What a teacher costs a training step: none, alive, or its targets from disk; the way from the data included.

    launch/local.sh -m experiments.teacher_targets --config configs/distill/language_model.py --folder runs/targets \\
        --config.training.steps=64
    launch/local.sh -m experiments.benchmarks.distillation_steps --config configs/distill/language_model.py \\
        --config.training.steps=64 --cache runs/targets

A turn is --steps steps of the trainer's own compiled step, each on the next batch of the config's own reader, to which
the third variant joins the targets; the variants take turns in one process. The figures are medians over turns, ratios
those of turns to "no teacher". About five minutes on 2 quiet cores.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import steps as training_steps
from fastlm import command_line
from fastlm.compress import distill, mixture
from fastlm.errors import UserError
from fastlm.measurement import workers
from fastlm.tasks.scoring import to_device
from fastlm.training import build

FLAGS = flags.FLAGS
PLAIN, LIVE, CACHED = "no teacher", "live teacher", "cached targets"


def variants(config: Mapping[str, Any], cache: str) -> dict[str, dict[str, Any]]:
    """Returns the config of each variant; with targets from disk the weights of the terms stay what they are.

    Raises:
      UserError: terms that a cache cannot stand in for.
    """
    section = config[distill.NAME]
    own = [weight for term, weight in section["terms"] if term == mixture.OWN]
    rest = [weight for term, weight in section["terms"] if term != mixture.OWN]
    others = [term for term, _ in section["terms"] if term != mixture.OWN]
    if [other.partition("(")[0] for other in others] != ["forward_kl"]:
        raise UserError(f"config.distilled.terms: a cache stands in for one 'forward_kl', not for {others}")
    terms = tuple((mixture.OWN, weight) for weight in own) + ((mixture.CACHED, rest[0]),)
    return {
        PLAIN: {**config, "wrappers": tuple(name for name in config["wrappers"] if name != distill.NAME)},
        LIVE: dict(config),
        CACHED: {**config, distill.NAME: {**section, "teachers": (), "cache": cache, "terms": terms}},
    }


class Reading:
    """Training steps of a config on the batches of its own reader."""

    def __init__(self, config: Mapping[str, Any], unused: Path) -> None:
        """Compiles."""
        self._experiment = build.build(config, unused)
        jax.set_mesh(self._experiment.mesh)
        self._batches = self._experiment.train_batches()
        first = to_device(next(self._batches), self._experiment.mesh)
        self._step = training_steps.TrainingStep(config, unused, first)

    def __call__(self, steps: int) -> dict[str, float]:
        """Runs so many; returns the seconds of one."""
        begun = time.perf_counter()
        for _ in range(steps):
            self._step(to_device(next(self._batches), self._experiment.mesh))
        return {"seconds": (time.perf_counter() - begun) / steps}


def table(taken: Mapping[str, list[dict[str, float]]]) -> str:
    """Returns medians, and ratios to the variant without a teacher, as Markdown."""
    lines = ["| | ms/step | of the step without a teacher |", "|---|---:|---:|"]
    for name, turns in taken.items():
        ratios = [one["seconds"] / plain["seconds"] for one, plain in zip(turns, taken[PLAIN], strict=True)]
        milliseconds = 1000 * statistics.median(one["seconds"] for one in turns)
        lines.append(f"| {name} | {milliseconds:.0f} | {statistics.median(ratios):.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    config = command_line.load_config(FLAGS.config, command_line.overrides())
    with tempfile.TemporaryDirectory() as unused:
        each = {name: Reading(one, Path(unused)) for name, one in variants(config, FLAGS.cache).items()}
        for one in each.values():
            one(2)  # lets the allocator settle
        timers = {name: (lambda one=one: one(FLAGS.steps)) for name, one in each.items()}
        print(table(workers.take_turns(timers, FLAGS.turns)))


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("config", None, "of a student with a live teacher")
    flags.DEFINE_string("cache", None, "folder of the teacher's targets for it")
    flags.DEFINE_integer("steps", 5, "in a turn", lower_bound=1)
    flags.DEFINE_integer("turns", 9, "of each variant", lower_bound=1)
    flags.mark_flags_as_required(["config", "cache"])


if __name__ == "__main__":
    define_flags()
    command_line.main(main, overridable=True)
