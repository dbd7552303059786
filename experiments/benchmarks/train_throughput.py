"""Training throughput of one small Transformer, side by side: PyTorch and fastlm, in alternation.

Model: GPT-2 style, 6 layers, 384 wide, 6 heads of 64, feed-forward 1536 with gelu (tanh), pre-norm
LayerNorm, biases, tied embeddings, vocabulary 8192, T 256, batch 16 (4,096 tokens a step), AdamW,
float32 master weights, mean cross-entropy; a step is forward, backward and update.

    launch/local.sh -m experiments.benchmarks.train_throughput --torch-python PYTHON_THAT_HAS_TORCH

About five minutes on 2 cores. Variants take turns (see `workers`); the figure is the median over turns with its
quartiles. PyTorch is optional: without --torch-python only fastlm is measured.
"""

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable

from fastlm.measurement import workers

VOCABULARY, WIDTH, HEADS, MLP, LAYERS, LENGTH, BATCH = 8192, 384, 6, 1536, 6, 256, 16
MICROBATCHES = 4  # ours: four rows' activations stay in the cache; PyTorch is faster without
VARIANTS = (
    "torch eager f32",
    "torch compile f32",
    "torch eager bf16",
    "torch compile bf16",
    "fastlm f32",
    "fastlm bf16",
)


def torch_step(form: str, dtype: str) -> Callable[[], float]:
    """Returns a function that runs one optimizer step in PyTorch and gives the loss."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, MLP), nn.Linear(MLP, WIDTH)

        def forward(self, x):
            b, t, d = x.shape
            q, k, v = (a.view(b, t, HEADS, -1).transpose(1, 2) for a in self.qkv(self.norm1(x)).split(d, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.LayerNorm(WIDTH)
            nn.init.normal_(self.tokens.weight, std=0.02)
            nn.init.normal_(self.positions.weight, std=0.02)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = torch.compile(model) if form == "compile" else model
    tokens, targets = torch.randint(0, VOCABULARY, (2, BATCH, LENGTH))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss = run(tokens, targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def jax_step(dtype: str) -> Callable[[], float]:
    """Returns a function that runs one optimizer step of fastlm's own model and train step, and gives the loss."""
    import jax
    import numpy as np

    from fastlm.models import Compute, Model, ModelConfig
    from fastlm.tasks import language_modeling
    from fastlm.training import optimizers, precision, state
    from fastlm.training.step import make_train_step

    cfg = ModelConfig(
        vocab_size=VOCABULARY,
        max_length=LENGTH,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        positions="learned",
        bias=True,
    )
    model = Model(cfg, Compute(dtype={"f32": "float32", "bf16": "bfloat16"}[dtype]))
    task = language_modeling.make(model, np.ones(VOCABULARY, np.int32))
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), model.init(jax.random.key(0))))
    optimizer = optimizers.make(name="adamw", learning_rate=3e-4, params=shapes, weight_decay=0.1, clip=0.0)
    scale = precision.loss_scale_for(model.compute.dtype)
    create = functools.partial(
        state.create, task, model, optimizer, seed=0, rows=BATCH, average=False, loss_scale=scale
    )
    step = jax.jit(make_train_step(task, optimizer, accumulation=MICROBATCHES), donate_argnums=0)
    rng, current = np.random.default_rng(0), [jax.jit(create)()]
    batch = {name: rng.integers(0, VOCABULARY, (BATCH, LENGTH), dtype=np.int32) for name in ("tokens", "targets")}
    batch["loss_mask"] = np.ones((BATCH, LENGTH), np.float32)

    def run() -> float:
        current[0], metrics = step(current[0], task.constants, batch)
        return float(metrics["sums/nll"] / metrics["sums/tokens"])

    return run


def work(variant: str) -> None:
    """The body of one process: build, warm up, then as many steps as each request says."""
    *torch_form, dtype = variant.removeprefix("torch ").split()
    step = jax_step(dtype) if variant.startswith("fastlm") else torch_step(torch_form[0], dtype)
    for _ in range(3):
        step()
    workers.serve(lambda steps: workers.timed(step, steps))


def measure(variants: list[str], torch_python: str | None, turns: int, steps: int) -> dict[str, list[dict]]:
    """Returns seconds and CPU seconds per step of every variant, one entry per turn."""
    python = {variant: torch_python if variant.startswith("torch") else None for variant in variants}
    running = {variant: workers.Worker(__file__, "--worker", variant, python=python[variant]) for variant in variants}
    asks = {variant: functools.partial(worker.ask, steps) for variant, worker in running.items()}
    results = workers.take_turns(asks, turns)
    workers.close(running.values())
    return results


def table(results: dict[str, list[dict]], baseline: str) -> str:
    """Returns the results as a Markdown table; ratios above 1 are faster than `baseline`."""
    lines = [
        f"| variant | tok/s (median) | best | quartiles of s/step | CPU s/step | ratio to {baseline} | CPU ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, turns in results.items():
        seconds, cpu = [t["seconds"] for t in turns], [t["cpu"] for t in turns]
        low, _, high = statistics.quantiles(seconds, n=4)
        pairs = list(zip(results[baseline], turns, strict=True))
        ratio = statistics.median(base["seconds"] / turn["seconds"] for base, turn in pairs)
        cpu_ratio = statistics.median(base["cpu"] / turn["cpu"] for base, turn in pairs)
        tokens = BATCH * LENGTH
        lines.append(
            f"| {variant} | {tokens / statistics.median(seconds):,.0f} | {tokens / min(seconds):,.0f} "
            f"| {low:.3f}-{high:.3f} | {statistics.median(cpu):.2f} | {ratio:.2f} | {cpu_ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Reads the flags, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="interpreter that can import torch; without it only jax is measured")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", help="JSON file for all turns")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        work(flags.worker)
        return
    variants = [v for v in flags.variants.split(",") if flags.torch_python or not v.startswith("torch")]
    results = measure(variants, flags.torch_python, flags.turns, flags.steps)
    if flags.out:
        with open(flags.out, "w") as file:
            json.dump(results, file, indent=1)
    medians = {v: statistics.median(t["seconds"] for t in turns) for v, turns in results.items()}
    peers = {v: s for v, s in medians.items() if v.startswith("torch")} or medians
    print(table(results, min(peers, key=peers.get)))


if __name__ == "__main__":
    main()
