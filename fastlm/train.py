"""Trains what a config describes: `python -m fastlm.train --config configs/lm_small.py`.

The same command resumes a run from its workdir. When the run ends it prints generated text, the
final metrics and where everything is, and writes `result.json`.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from fastlm import command_line
from fastlm.decoding import sample
from fastlm.parallel import multihost
from fastlm.tasks.language_modeling import LanguageModeling
from fastlm.training import build, loop, workdir_files

CONFIG = flags.DEFINE_string("config", None, "Python file with get_config(); override with --config.section.key=value")
WORKDIR = flags.DEFINE_string("workdir", "", "where the run lives; default runs/<name of the config>")
PROFILE = flags.DEFINE_bool("profile", False, "write a jax.profiler trace of five steps to <workdir>/profile")


def main() -> None:
    """Builds the experiment, trains it, and reports."""
    started = time.perf_counter()
    config = command_line.load_config(CONFIG.value, command_line.overrides())
    workdir = Path(WORKDIR.value or Path("runs") / Path(CONFIG.value.partition(":")[0]).stem)
    experiment = build.build(config, workdir)
    if multihost.is_primary():
        print(_banner(experiment), *experiment.notes, sep="\n", flush=True)
    result = loop.run(experiment, profile=PROFILE.value, say=lambda text: print(text, flush=True))
    if result.status != "finished":
        return
    texts = generate_samples(experiment, result.weights["model"])
    if multihost.is_primary():
        _report(experiment, result, texts, time.perf_counter() - started)


def generate_samples(experiment: build.Experiment, params: Any) -> list[str]:
    """Continues each prompt of `config.sample` with the trained weights."""
    settings, prompts = experiment.sample, experiment.sample.prompts
    if not prompts:
        return []
    tokenizer = experiment.tokenizer
    ids = [sample.prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = experiment.model.cfg.max_length - max(map(len, ids))
    chunks = sample.generate(
        experiment.model,
        params,
        ids,
        max_tokens=min(settings.tokens, room),
        how=settings.how,
        seed=experiment.seed,
    )
    rows = sample.until_end(chunks, tokenizer.eos)
    return [prompt + sample.text_of(tokenizer, row) for prompt, row in zip(prompts, rows)]


def _banner(experiment: build.Experiment) -> str:
    cfg = experiment.model.cfg
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(experiment.model.init, jax.random.key(0))))
    mesh = ", ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items() if size > 1) or "one device"
    return (
        f"{count / 1e6:.1f}M parameters: {cfg.layers} layers x {cfg.width}, vocabulary {cfg.vocab_size}; "
        f"{experiment.training.steps} steps of {experiment.data.batch_size} x {experiment.data.length} tokens, "
        f"{experiment.model.compute.dtype} on {jax.default_backend()} ({mesh})"
    )


def _report(experiment: build.Experiment, result: loop.Result, texts: list[str], seconds: float) -> None:
    outcome = {"status": "finished", "step": result.step, "metrics": result.metrics, "seconds": round(seconds, 1)}
    workdir_files.write_whole(experiment.workdir / "result.json", json.dumps(outcome, indent=1))
    for text in texts:
        print(f"\n--- sample ---\n{text}")
    if texts:
        workdir_files.write_whole(experiment.workdir / "samples.txt", "\n\n--- sample ---\n".join(texts) + "\n")
    if result.metrics:
        print(f"\n{experiment.evaluation.final_split or experiment.evaluation.split}: {_scores(result.metrics)}")
    print(f"saved in {experiment.workdir}: checkpoints/, metrics.jsonl, tensorboard/, config.json, result.json")
    language_model = isinstance(experiment.kind, LanguageModeling)
    follow = "generate" if language_model else "evaluate"
    more = " --prompt 'Fellow citizens'" if language_model else " --outputs 5"
    print(f"next: launch/local.sh -m fastlm.{follow} --workdir {experiment.workdir}{more}", flush=True)


def _scores(metrics: dict[str, float]) -> str:
    """Metrics on one line, each with its standard error where there is one."""
    names = {"bits_per_byte": "bits/byte"}
    counted = [f"over {metrics[unit]:.0f} {unit}" for unit in ("documents", "rows") if unit in metrics]
    shown = []
    for name, value in metrics.items():
        if name.endswith("_error") or name in ("documents", "rows"):
            continue
        error = metrics.get(f"{name}_error")
        more = "" if error is None else f" (standard error {' '.join([f'{error:.4f}', *counted])})"
        shown.append(f"{names.get(name, name)} {value:.4f}{more}")
    return ", ".join(shown)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.main(main, overridable=True)
