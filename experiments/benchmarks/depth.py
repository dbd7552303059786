"""What depth costs before the first step: tracing, lowering, compiling, and memory.

    python -m experiments.benchmarks.depth --layers=4,12,24 --out=depth.json

The train step of a decoder (width 256, 4 heads, 8 x 128 tokens, vocabulary 1024, bfloat16, AdamW) is traced, lowered
and compiled, not run, once for each depth. Every depth has a process of its own, so that its peak of memory is its
own, and the persistent compilation cache is off. About a minute on two quiet cores.
Columns: seconds of work by this process (CPU seconds: on a shared machine the clock on the wall measures the
neighbours) and on the clock; the largest resident memory of the process; of the compiled program, the memory for
arguments (the state) and for temporaries (activations).
"""

import dataclasses
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from fastlm import command_line
from fastlm.models import Compute, Model, ModelConfig
from fastlm.tasks import language_modeling
from fastlm.training import optimizers, precision, state
from fastlm.training.step import make_train_step

FLAGS = flags.FLAGS
VOCABULARY, ROWS, LENGTH = 1024, 8, 128


@dataclasses.dataclass(frozen=True)
class Row:
    """One depth: CPU seconds of each stage, seconds on the clock of all three, and memory in MiB."""

    layers: int
    trace: float
    lower: float
    compile: float
    wall: float
    peak_rss: float
    arguments: float
    temporaries: float


def measure(layers: int, width: int, remat: str) -> Row:
    """Compiles the train step at one depth in this process."""
    jax.config.update("jax_enable_compilation_cache", False)
    step, arguments = train_step(layers, width, remat)
    started = time.perf_counter()
    trace, traced = _cpu_seconds(lambda: jax.jit(step, donate_argnums=0).trace(*arguments))
    lower, lowered = _cpu_seconds(traced.lower)
    compiling, compiled = _cpu_seconds(lowered.compile)
    wall = time.perf_counter() - started
    memory = compiled.memory_analysis()
    return Row(
        layers=layers,
        trace=trace,
        lower=lower,
        compile=compiling,
        wall=wall,
        peak_rss=_peak_rss() / 2**20,
        arguments=memory.argument_size_in_bytes / 2**20,
        temporaries=memory.temp_size_in_bytes / 2**20,
    )


def train_step(layers: int, width: int, remat: str) -> tuple[Callable, tuple[Any, Any, Any]]:
    """Returns the train step and its arguments as shapes."""
    cfg = ModelConfig(vocab_size=VOCABULARY, max_length=LENGTH, layers=layers, width=width, heads=4)
    model = Model(cfg, Compute(dtype="bfloat16", remat=remat))
    task = language_modeling.make(model, np.ones(VOCABULARY, np.int32))
    params = jax.eval_shape(lambda: task.init(jax.random.key(0), model.init(jax.random.key(0))))
    optimizer = optimizers.make(name="adamw", learning_rate=1e-3, params=params)
    start = jax.eval_shape(
        lambda: state.create(
            task, model, optimizer, seed=0, rows=ROWS, average=False, loss_scale=precision.loss_scale_for("bfloat16")
        )
    )
    ids, mask = (jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ids) | {"loss_mask": mask}
    return make_train_step(task, optimizer), (start, task.constants, batch)


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| layers | trace, CPU s | lower, CPU s | compile, CPU s | all, clock s | peak RSS, MiB | state, MiB | temporaries, MiB |",  # noqa: E501
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.layers} | {r.trace:.2f} | {r.lower:.2f} | {r.compile:.1f} | {r.wall:.1f} | {r.peak_rss:.0f} "
        f"| {r.arguments:.0f} | {r.temporaries:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def define_flags() -> None:
    """Defines the flags; not on import, for benchmarks that stand side by side share names."""
    flags.DEFINE_list("layers", ["4", "12", "24"], "depths to compile")
    flags.DEFINE_integer("width", 256, "model width")
    flags.DEFINE_string("remat", "none", "rematerialisation, as config.compute.remat")
    flags.DEFINE_string("out", "", "JSON file for the rows of the table")


def main() -> None:
    """Measures each depth in a fresh process, prints the table and writes the rows."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for layers in FLAGS.layers:
            rows.append(pool.apply(measure, (int(layers), FLAGS.width, FLAGS.remat)))
    print(table(rows))
    if FLAGS.out:
        Path(FLAGS.out).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")


def _cpu_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def _peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
