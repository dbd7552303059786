"""Attention kinds as language models: bits per byte at equal parameters and equal time.

    launch/local.sh -m experiments.attention_language_models --folder runs/attention_language_models --minutes 8

Each model is `configs/lm_small.py` with another attention, its feed-forward narrowed or widened until it has as many
parameters as the one with full attention. Equal time means that each gets so many steps as its median step, measured
before with nothing else running, fits into --minutes: full attention learns the fewest tokens where it is slowest. Rows
are of --length tokens. Models with memory (Transformer-XL, states, windows) read in `stream` mode and are scored so;
the others are packed, and scored with half a row of context repeated. One seed unless --seeds says more. Results are
lines of results.jsonl under --folder; a finished run is not run again, a stopped one resumes. Six models at eight
minutes: about an hour on two quiet cores.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import runs
from fastlm import command_line
from fastlm.errors import UserError, nearest
from fastlm.models import ModelConfig, abstract
from fastlm.ops import paths
from fastlm.training import workdir_files

FLAGS = flags.FLAGS
CONFIG = "configs/lm_small.py"
PROBE_STEPS = 40

# A name -> attention of the layers, whether rows go on from batch to batch.
MODELS: dict[str, tuple[str, bool]] = {
    "full": ("full", False),
    "local": ("local(window=128)", True),
    "linear": ("linear", True),
    "gated_delta": ("gated_delta", True),
    "transformer_xl": ("transformer_xl(memory=256)", True),
    "hybrid": ("('gated_delta','gated_delta','gated_delta','full')", True),
}


def arguments(name: str, length: int, seed: int, width: int) -> tuple[str, ...]:
    """Returns the trainer's arguments for a model with this width of feed-forward, but for the steps."""
    attention, stream = MODELS[name]
    rows = max(4096 // length, 1)  # tokens a step stay what they are
    return (
        *("--config", CONFIG, f"--config.seed={seed}", f"--config.model.attention={attention}"),
        *(f"--config.model.feed_forward_width={width}", f"--config.data.length={length}"),
        *(f"--config.data.batch_size={rows}", f"--config.training.accumulation={math.gcd(4, rows)}"),
        *(f"--config.model.max_length={max(2 * length, 512)}", f"--config.evaluation.overlap={length // 2}"),
        *(f"--config.data.mode={'stream' if stream else 'packed'}", "--config.logging.every=5"),
        *("--config.checkpoint.every=100", "--config.sample.prompts=()"),
    )


def parameters(name: str, length: int, width: int) -> int:
    """Returns how many numbers the model has."""
    changes = [argument.removeprefix("--config.") for argument in arguments(name, length, 0, width)[2:]]
    config = command_line.load_config(CONFIG, changes)
    cfg = ModelConfig(**config["model"] | {"vocab_size": config["tokenizer"]["vocab_size"] + 1})
    return sum(leaf.size for leaf in paths.flatten(abstract(cfg)[0]).values())


def equal_width(name: str, length: int) -> int:
    """Returns the width of feed-forward at which the model has as many parameters as the one with full attention."""
    default = 4 * command_line.load_config(CONFIG, [])["model"]["width"]
    wanted = parameters("full", length, default)
    per_unit = (parameters(name, length, 2 * default) - parameters(name, length, default)) / default
    return round(default + (wanted - parameters(name, length, default)) / per_unit)


def measure_step(name: str, length: int, width: int, folder: Path) -> float:
    """Returns the median seconds of a step, from a short run that is kept."""
    workdir = folder / "probes" / name
    path = workdir / "metrics.jsonl"
    if not (workdir / "result.json").is_file():
        short = (f"--config.training.steps={PROBE_STEPS}", "--config.evaluation.every=0")
        short += ("--config.evaluation.final_split=", f"--config.checkpoint.every={PROBE_STEPS}")
        if runs.train((*arguments(name, length, 0, width), *short), workdir) is None:
            raise UserError(f"{name}: the short run did not finish; see {runs.log_of(workdir)}")
    return runs.median_step(path)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model came to; one line of results.jsonl."""

    name: str
    seed: int
    bits_per_byte: float
    error: float
    steps: int
    step_seconds: float
    parameters: int
    feed_forward_width: int
    peak_memory: float


def run(name: str, seed: int, length: int, minutes: float, folder: Path) -> Result | None:
    """Trains one model for so many minutes of steps; None if it did not finish."""
    width = equal_width(name, length)
    step = measure_step(name, length, width, folder)
    steps = max(round(60 * minutes / step), 1)
    workdir = folder / name / f"seed{seed}"
    outcome = runs.train((*arguments(name, length, seed, width), f"--config.training.steps={steps}"), workdir)
    if outcome is None:
        return None
    metrics = outcome.metrics
    size = parameters(name, length, width)
    scores = (metrics["bits_per_byte"], metrics["bits_per_byte_error"])
    return Result(name, seed, *scores, steps, step, size, width, outcome.peak_memory)


def table(results: Sequence[Result]) -> str:
    """Returns the results as Markdown, in the order of `MODELS`."""
    lines = [
        "| attention | seed | bits/byte | steps | s/step | parameters | feed-forward | peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in sorted(results, key=lambda one: (list(MODELS).index(one.name), one.seed)):
        lines.append(
            f"| {MODELS[result.name][0]} | {result.seed} | {result.bits_per_byte:.4f} ± {result.error:.4f} "
            f"| {result.steps} | {result.step_seconds:.3f} | {result.parameters:,} | {result.feed_forward_width} "
            f"| {result.peak_memory:.0f} |"
        )
    return "\n".join(lines)


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("folder", "runs/attention_language_models", "where results.jsonl and the workdirs lie")
    flags.DEFINE_list("models", list(MODELS), "which")
    flags.DEFINE_list("seeds", ["0"], "seeds of each")
    flags.DEFINE_float("minutes", 8.0, "time of training that each gets", lower_bound=0.01)
    flags.DEFINE_integer("length", 256, "tokens in a row", lower_bound=16)


def read(path: Path) -> dict[tuple[str, int], Result]:
    """Returns the results that are there already."""
    lines = path.read_text().splitlines() if path.is_file() else []
    found = (Result(**json.loads(line)) for line in lines)
    return {(result.name, result.seed): result for result in found}


def main() -> None:
    """Reads the flags, measures steps, trains, prints the table."""
    folder = Path(FLAGS.folder)
    for name in FLAGS.models:
        if name not in MODELS:
            raise UserError(f"--models: unknown '{name}'{nearest(name, MODELS) or '; one of: ' + ', '.join(MODELS)}")
    seeds = [runs.seed(text) for text in FLAGS.seeds]
    settings: dict[str, Any] = {"length": FLAGS.length, "minutes": FLAGS.minutes}
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / "settings.json", settings)
    widths = {name: equal_width(name, FLAGS.length) for name in FLAGS.models}
    for name, width in widths.items():  # all of them first, before anything makes the machine warm or full
        print(f"{name}: {measure_step(name, FLAGS.length, width, folder):.3f} s/step", flush=True)
    results = read(folder / "results.jsonl")
    for seed in seeds:
        for name in FLAGS.models:
            if (name, seed) in results:
                continue
            result = run(name, seed, FLAGS.length, FLAGS.minutes, folder)
            if result is None:
                raise UserError(f"{name}, seed {seed} did not finish: see {runs.log_of(folder / name / f'seed{seed}')}")
            results[name, seed] = result
            with (folder / "results.jsonl").open("a") as lines:
                lines.write(json.dumps(dataclasses.asdict(result)) + "\n")
    text = table(list(results.values()))
    workdir_files.write_whole(folder / "results.md", text + "\n")
    print(text)


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise UserError(f"{path}: these runs have other settings ({path.read_text().strip()}); name another --folder")
    workdir_files.write_whole(path, json.dumps(settings) + "\n")


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
