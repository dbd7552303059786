"""Does training wait for data? The share of the step time that goes to the input, in a real run.

    python -m experiments.benchmarks.input_pipeline --config configs/lm_small.py --out=input_pipeline.json

Three measurements on one config, about a minute for lm_small on two quiet cores. In a run: seconds in `next(batches)`
and in `to_device` against those of the whole step, every step waited for, so that the thread that reads ahead competes
with the step for the cores as it does in training. Alone: tokens/s of the pipeline with nothing else to do, and
beside it how many times that is what the model consumes. Goal: at most 3% of the step.
The first steps, which compile and fill the caches, are not counted. Medians over steps would hide the batches that
come late; these are sums.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from fastlm import command_line
from fastlm.tasks import scoring
from fastlm.training import build, loop

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds per step: waiting for a batch, handing it to the device, computing; and tokens/s.

    Attributes:
      tokens_per_second: of the run.
      pipeline_tokens_per_second: of the pipeline alone, batches handed to the device included.
    """

    steps: int
    next_batch: float
    to_device: float
    compute: float
    tokens_per_second: float
    pipeline_tokens_per_second: float

    @property
    def share(self) -> float:
        """Share of the step time that goes to the input."""
        waiting = self.next_batch + self.to_device
        return waiting / (waiting + self.compute)


def measure(experiment: build.Experiment, steps: int, skip: int) -> Result:
    """Trains `skip` + `steps` steps, then drains as many batches from a fresh pipeline."""
    jax.set_mesh(experiment.mesh)
    next_batch, to_device, compute = _train(experiment, steps, skip)
    tokens = experiment.data.batch_size * experiment.data.length
    return Result(
        steps=steps,
        next_batch=next_batch / steps,
        to_device=to_device / steps,
        compute=compute / steps,
        tokens_per_second=tokens * steps / (next_batch + to_device + compute),
        pipeline_tokens_per_second=tokens * steps / _drain(experiment, steps, skip),
    )


def _train(experiment: build.Experiment, steps: int, skip: int) -> tuple[float, float, float]:
    """Seconds in each of the three parts, summed over `steps`."""
    run = loop.Run(experiment, say=lambda text: None)
    sums = [0.0, 0.0, 0.0]
    for step in range(skip + steps):
        times = [time.perf_counter()]
        host = next(run.batches)
        times.append(time.perf_counter())
        batch = jax.block_until_ready(scoring.to_device(host, experiment.mesh))
        times.append(time.perf_counter())
        run.state, _ = jax.block_until_ready(run.train_step(run.state, experiment.task.constants, batch))
        times.append(time.perf_counter())
        if step >= skip:
            sums = [total + end - start for total, start, end in zip(sums, times, times[1:])]
    run.batches.close()
    run.checkpoints.close()
    return sums[0], sums[1], sums[2]


def _drain(experiment: build.Experiment, steps: int, skip: int) -> float:
    """Seconds for `steps` batches with nothing else to do."""
    batches = experiment.train_batches()
    for _ in range(skip):
        next(batches)
    started = time.perf_counter()
    for _ in range(steps):
        jax.block_until_ready(scoring.to_device(next(batches), experiment.mesh))
    seconds = time.perf_counter() - started
    batches.close()
    return seconds


def table(result: Result) -> str:
    """Returns the result as Markdown."""
    step = result.next_batch + result.to_device + result.compute
    faster = result.pipeline_tokens_per_second / result.tokens_per_second
    return "\n".join(
        [
            "| part of a step | ms | share |",
            "|---|---:|---:|",
            f"| wait for the batch | {1e3 * result.next_batch:.2f} | {result.next_batch / step:.2%} |",
            f"| hand it to the device | {1e3 * result.to_device:.2f} | {result.to_device / step:.2%} |",
            f"| compute | {1e3 * result.compute:.2f} | {result.compute / step:.2%} |",
            "",
            f"input: {result.share:.2%} of the step (goal: at most 3%); training {result.tokens_per_second:,.0f} "
            f"tokens/s, the pipeline alone {result.pipeline_tokens_per_second:,.0f} ({faster:.0f} times that)",
        ]
    )


def define_flags() -> None:
    """Defines the flags; not on import, for benchmarks that stand side by side share names."""
    flags.DEFINE_string("config", "configs/lm_small.py", "what to train; override with --config.section.key=value")
    flags.DEFINE_integer("steps", 40, "steps that are measured", lower_bound=1)
    flags.DEFINE_integer("skip", 5, "steps before those", lower_bound=1)
    flags.DEFINE_string("out", "", "JSON file for the result")


def main() -> None:
    """Builds the experiment in a folder that is thrown away, measures, reports."""
    config = command_line.load_config(FLAGS.config, command_line.overrides())
    with tempfile.TemporaryDirectory() as workdir:
        result = measure(build.build(config, workdir), FLAGS.steps, FLAGS.skip)
    print(table(result))
    if FLAGS.out:
        values = dataclasses.asdict(result) | {"share": result.share}
        Path(FLAGS.out).write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    command_line.main(main, overridable=True)
