"""What each attention kind costs as rows grow: time, memory and decoding, beside full attention and PyTorch's.

    launch/local.sh -m experiments.benchmarks.attention_scaling --torch-python PYTHON_THAT_HAS_TORCH \\
        --out runs/attention_scaling.json --figure experiments/figures/attention_scaling.png

One attention sublayer (projections included), width 256, 4 heads of 64, one row of T = 256 ... 16,384 tokens, causal
(kinds that cannot be are measured without), float32 or bfloat16. Full attention stands there as
fastlm runs it (the fastest exact form), as a T x T matrix up to 4,096 (with a gradient by hand, `key_major`, and as
Long Range Arena had it, einsums and a softmax, `plain`), and as PyTorch's `scaled_dot_product_attention`, with its
sliding window beside it, a band in a T x T mask.
Time is the median over turns, all variants in alternation. Memory of ours is what the compiled program asks for beside
its arguments (XLA's own account); of PyTorch what the process grew by. A decoding step reads one token behind T - 1.
Exponents are fitted to the lengths from 1,024 on; the crossover is the length from which on a kind stays faster than
the fastest exact form. About 20 minutes on 2 quiet cores; `--lengths` and `--kinds` cut it.
"""

import argparse
import ctypes
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastlm.measurement import workers

WIDTH, HEADS, WINDOW = 256, 4, 128
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
PASSES = ("forward", "training", "decoding")
FULL, MATRIX, PLAIN = "full", "full, as a matrix", "full, plainly"
FORMS = {MATRIX: "key_major", PLAIN: "plain"}  # of full attention
TORCH = ("torch full", "torch window")
UP_TO = {MATRIX: 4096, PLAIN: 4096}  # whose T x T arrays would fill the memory of a small machine
SECONDS = 0.15  # at least so long a turn


def of_fastlm(variant: str, length: int, what: str, dtype: str) -> tuple[Callable[[], Any], float]:
    """Returns (a call that runs the layer once, the bytes that it needs beside its arguments)."""
    import jax
    import jax.numpy as jnp

    from fastlm.models import Compute, ModelConfig
    from fastlm.models import attention as kinds
    from fastlm.ops.masks import MaskSpec

    spec = {MATRIX: "full", PLAIN: "full", "local": f"local(window={WINDOW})"}.get(variant, variant)
    causal = kinds.kind(spec).causal
    family = {"family": "decoder"} if causal else {"family": "encoder", "head": "none"}
    cfg = ModelConfig(
        width=WIDTH, heads=HEADS, layers=1, vocab_size=8, max_length=length, attention=spec, **family
    ).layer(0)
    module = kinds.make(spec, cfg, Compute(dtype=dtype, attention_form=FORMS.get(variant, "auto")))
    tokens = 1 if what == "decoding" else length
    x = jax.random.normal(jax.random.key(0), (1, tokens, WIDTH), dtype)
    positions = length - tokens + jnp.arange(tokens)[None]
    short = MaskSpec(causal)
    boxed = module.init(jax.random.key(1), x[:, :2], x[:, :2], positions=positions[:, :2], mask=short)["params"]
    params = jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda leaf: hasattr(leaf, "value"))
    look = {"positions": positions, "mask": MaskSpec(causal)}
    apply = lambda params, x, **more: module.apply({"params": params}, x, x, **(look | more))
    if what == "decoding":
        cache = kinds.empty_cache(spec, cfg, 1, length, jnp.dtype(dtype))
        mask = MaskSpec(offset=jnp.full((1,), length - 1))
        step = lambda params, x, cache: apply(params, x, cache=cache, mask=mask)[:2]
        run = jax.jit(step, donate_argnums=2).lower(params, x, cache).compile()
        held = [cache]

        def call() -> Any:
            y, held[0] = run(params, x, held[0])
            return jax.block_until_ready(y)

        return call, run.memory_analysis().temp_size_in_bytes
    loss = lambda params, x: jnp.sum(apply(params, x)[0].astype(jnp.float32) ** 2)
    function = jax.grad(loss, (0, 1)) if what == "training" else lambda params, x: apply(params, x)[0]
    run = jax.jit(function).lower(params, x).compile()
    memory = run.memory_analysis()
    return lambda: jax.block_until_ready(run(params, x)), memory.temp_size_in_bytes + memory.output_size_in_bytes


def of_torch(variant: str, length: int, what: str, dtype: str) -> tuple[Callable[[], Any], float]:
    """Returns the same of PyTorch's attention."""
    import torch
    from torch.nn import functional

    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=kind) * WIDTH**-0.5) for _ in range(4)]
    x = torch.randn(1, length, WIDTH, dtype=kind, requires_grad=what == "training")
    slots = torch.arange(length)
    back = slots[:, None] - slots
    band = (back >= 0) & (back < WINDOW) if variant == "torch window" else None
    cut = lambda t: t.view(1, length, HEADS, -1).transpose(1, 2)

    def forward() -> Any:
        q, k, v = (cut(x @ w) for w in weights[:3])
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=band, is_causal=band is None)
        return y.transpose(1, 2).reshape(1, length, WIDTH) @ weights[3]

    def call() -> Any:
        if what == "training":
            return torch.autograd.grad((forward().float() ** 2).sum(), [x, *weights])
        with torch.no_grad():
            return forward()

    return call, growth(call)


def growth(call: Callable[[], Any]) -> float:
    """Returns by how many bytes the process is larger while `call` runs (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    status = lambda name: 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])
    before = status("VmRSS")
    call()
    return float(status("VmHWM") - before)


def work(library: str) -> None:
    """The body of a worker: prepares what it is told to, and times what it prepared."""
    ready: dict[tuple, tuple[Callable[[], Any], int]] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        key = (request["variant"], request["length"], request["what"])
        if request["do"] == "time":
            call, times = ready[key]
            return workers.timed(call, times)
        if request["do"] == "forget":
            ready.clear()
            return {}
        make = of_torch if library == "torch" else of_fastlm
        call, memory = make(*key, request["dtype"])
        workers.timed(call)
        once = workers.timed(call)["seconds"]
        ready[key] = (call, max(1, math.ceil(SECONDS / once)))
        return {"bytes": memory}

    workers.serve(answer)


def measure(
    running: dict[str, workers.Worker],
    variants: list[str],
    lengths: list[int],
    dtype: str,
    turns: int,
    rows: list[dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """Yields `rows` longer and longer: one (variant, length, pass, median seconds, bytes) per measurement.

    Args:
      rows: what was measured before; lengths and passes that are in it are left out.
    """
    there = {(row["length"], row["pass"]) for row in rows}
    for length in lengths:
        for what in PASSES:
            if (length, what) in there:
                continue
            asks, memory = {}, {}
            for variant in variants:
                if not measured(variant, length, what):
                    continue
                worker = running["torch" if variant in TORCH else "fastlm"]
                request = {"variant": variant, "length": length, "what": what, "dtype": dtype}
                memory[variant] = worker.ask(request | {"do": "prepare"})["bytes"]
                asks[variant] = functools.partial(worker.ask, request | {"do": "time"})
            for variant, taken in workers.take_turns(asks, turns).items():
                seconds = [turn["seconds"] for turn in taken]
                row = {"variant": variant, "length": length, "pass": what, "bytes": memory[variant]}
                rows.append(row | {"seconds": statistics.median(seconds), "turns": seconds})
                print(f"{variant:>20} T {length:>6} {what:>9}: {rows[-1]['seconds'] * 1e3:9.2f} ms", flush=True)
            for worker in running.values():
                worker.ask({"variant": "", "length": 0, "what": "", "do": "forget"})
            yield rows


def measured(variant: str, length: int, what: str) -> bool:
    """Whether there is such a measurement: what makes matrices ends earlier, and not everything decodes."""
    if length > UP_TO.get(variant, length):
        return False
    if what != "decoding" or variant in (*FORMS, *TORCH):
        return what != "decoding"
    from fastlm.models import attention as kinds

    return kinds.kind(variant).decode


def exponent(points: dict[int, float], least: int = 1024) -> float:
    """Returns the slope of log seconds over log length, by least squares over lengths from `least` on."""
    pairs = [(math.log(length), math.log(seconds)) for length, seconds in points.items() if length >= least]
    if len(pairs) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*pairs)).slope


def crossover(points: dict[int, float], baseline: dict[int, float]) -> int | None:
    """Returns the least length from which on `points` stay below `baseline`; None if they end above it."""
    found = None
    for length in sorted(set(points) & set(baseline)):
        found = (found or length) if points[length] < baseline[length] else None
    return found


def by_length(rows: list[dict], variant: str, what: str, field: str = "seconds") -> dict[int, float]:
    """Returns one variant's figures by length."""
    return {row["length"]: row[field] for row in rows if (row["variant"], row["pass"]) == (variant, what)}


def table(rows: list[dict]) -> str:
    """Returns the results as Markdown."""
    lengths = sorted({row["length"] for row in rows})
    at = 4096 if 4096 in lengths else lengths[-1]
    heads = (
        *("kind", f"ms at {at:,}: forward", "forward + backward", "x plain", "x matrix", "x fastest exact", "MiB"),
        *("exponent", "crossover", f"decoding, us: at {lengths[0]:,}", f"at {lengths[-1]:,}"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        lines.append(f"| {' | '.join([variant, *_cells(rows, variant, at, lengths)])} |")
    return "\n".join(lines)


def _cells(rows: list[dict], variant: str, at: int, lengths: list[int]) -> list[str]:
    """A variant's figures; "-" where there is none."""
    full, matrix, plain = (by_length(rows, name, "training") for name in (FULL, MATRIX, PLAIN))
    training, decoding = by_length(rows, variant, "training"), by_length(rows, variant, "decoding")
    here = training.get(at, math.nan)
    values = [
        (by_length(rows, variant, "forward").get(at, math.nan) * 1e3, ".1f"),
        (here * 1e3, ".1f"),
        (plain.get(at, math.nan) / here, ".1f"),
        (matrix.get(at, math.nan) / here, ".1f"),
        (full.get(at, math.nan) / here, ".1f"),
        (by_length(rows, variant, "training", "bytes").get(at, math.nan) / 2**20, ".0f"),
        (exponent(training), ".2f"),
        (crossover(training, full) or math.nan, ",.0f"),
        (decoding.get(lengths[0], math.nan) * 1e6, ".0f"),
        (decoding.get(lengths[-1], math.nan) * 1e6, ".0f"),
    ]
    return ["-" if math.isnan(value) else format(value, form) for value, form in values]


def draw(rows: list[dict], out: str) -> None:
    """Draws time, memory and decoding over length, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("training", "seconds", 1e3, "forward + backward, ms"),
        ("training", "bytes", 2**-20, "memory, MiB"),
        ("decoding", "seconds", 1e6, "one decoding step, us"),
    )
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    colors = dict(zip([v for v in variants if v not in (FULL, *FORMS, *TORCH)], plt.get_cmap("tab20").colors))
    marked = {FULL: ("black", "-", 2.4), MATRIX: ("black", ":", 1.6), TORCH[0]: ("gray", "-", 1.6)}
    marked |= {PLAIN: ("black", "--", 1.2), TORCH[1]: ("gray", ":", 1.6)}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), dpi=120)
    for panel, (what, field, factor, title) in zip(axes, panels):
        for variant in variants:
            points = by_length(rows, variant, what, field)
            color, style, width = marked.get(variant, (colors.get(variant), "-", 1.3))
            values = [value * factor for value in points.values()]
            panel.plot(list(points), values, style, color=color, linewidth=width, label=variant, marker=".")
        panel.set(xscale="log", yscale="log", title=title, xlabel="tokens in a row")
        lengths = sorted({row["length"] for row in rows})
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45, fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.savefig(out)


def main() -> None:
    """Reads the flags, measures, prints the table, draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="interpreter that can import torch; without it only fastlm is measured")
    parser.add_argument("--kinds", default="", help="kinds with commas between; default all")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", help="JSON file for all measurements; those in it are not repeated")
    parser.add_argument("--show", action="store_true", help="only show what is in --out")
    parser.add_argument("--figure", help="PNG file for the plot")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        return work(flags.worker)
    rows = json.loads(Path(flags.out).read_text()) if flags.out and Path(flags.out).is_file() else []
    if not flags.show:
        from fastlm.models.attention import KINDS
        from fastlm.training import workdir_files

        others = flags.kinds.split(",") if flags.kinds else [kind for kind in KINDS if kind != FULL]
        variants, lengths = [FULL, MATRIX, PLAIN, *others], [int(length) for length in flags.lengths.split(",")]
        running = {"fastlm": workers.Worker(__file__, "--worker", "fastlm")}
        if flags.torch_python:
            running["torch"] = workers.Worker(__file__, "--worker", "torch", python=flags.torch_python)
            variants += TORCH
        for measured_rows in measure(running, variants, lengths, flags.dtype, flags.turns, rows):
            if flags.out:
                Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
                workdir_files.write_whole(Path(flags.out), json.dumps(measured_rows, indent=1))
        workers.close(running.values())
    print(table(rows))
    if flags.figure:
        draw(rows, flags.figure)
    return None


if __name__ == "__main__":
    main()
