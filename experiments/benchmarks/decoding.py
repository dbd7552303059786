"""One model written by many programs: tokens a second behind a prompt, greedily, all taking turns.

    launch/local.sh -m experiments.benchmarks.decoding --programs jax:runs/smollm2,onnx:exported/int4 \\
        [--programs huggingface:FOLDER,llama:FILE.gguf --torch-python PYTHON --llama-python PYTHON]

Programs: `jax` (a workdir, float32; `jax-bfloat16`, `jax-float16` compute in these), `onnx` (what fastlm.export wrote),
`huggingface` (transformers' `generate` on a folder; `huggingface-bfloat16`), `llama` (llama.cpp, by the package
xllamacpp, on a .gguf file). Each lives in a process of its own; a turn is 32 random tokens read and 128 written by each
program in turn, of which only writing counts. The bound beside them is a bare product in float32, XLA's, of all weights
with as many rows. Medians over turns, ratios to the first program. Five minutes with six programs on 2 quiet cores.
Notable: other interpreters import nothing but what this file names, and the standard library.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable

from fastlm.measurement import workers

PROMPT, NEW = 32, 128
Write = Callable[[int], float]  # from rows to the seconds that NEW tokens of each take


def of_jax(path: str, dtype: str) -> Write:
    """Our own decoding in XLA."""
    from fastlm.exports import runtimes
    from fastlm.parallel import mesh

    restored = runtimes.restore("jax", path, mesh.make(), dtype=dtype or "float32")
    timed = runtimes.timed("jax", restored, None)
    return lambda rows: sum(timed.write(rows, PROMPT, NEW))


def of_onnx(path: str, dtype: str) -> Write:
    """An export in ONNX Runtime, by our loop."""
    del dtype
    from fastlm.exports import runtimes
    from fastlm.parallel import mesh

    timed = runtimes.timed("onnx", runtimes.restore("onnx", path, mesh.make()), None)
    return lambda rows: sum(timed.write(rows, PROMPT, NEW))


def of_huggingface(path: str, dtype: str) -> Write:
    """`generate` of transformers; writing is what 129 tokens take more than one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype or "float32")).eval()

    def seconds(rows: int, new: int) -> float:
        tokens = torch.arange(100, 100 + rows * PROMPT).reshape(rows, PROMPT)
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=new, max_new_tokens=new
            )
        return time.perf_counter() - begun

    return lambda rows: seconds(rows, NEW + 1) - seconds(rows, 1)


def of_llama(path: str, dtype: str) -> Write:
    """llama.cpp's server, asked by as many threads as there are rows; its own clock tells reading from writing."""
    del dtype
    import xllamacpp

    servers = {}

    def server(rows: int):
        if rows not in servers:
            options = xllamacpp.CommonParams()
            options.model.path, options.n_parallel, options.n_ctx = path, rows, 2 * (PROMPT + NEW) * rows
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 2
            options.n_gpu_layers, options.verbosity = 0, 0
            servers[rows] = xllamacpp.Server(options)
        return servers[rows]

    def write(rows: int) -> float:
        found: dict[int, dict] = {}

        def ask(row: int) -> None:
            request = {"prompt": list(range(100 + row, 100 + row + PROMPT)), "n_predict": NEW, "temperature": 0.0}
            told = server(rows).handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
            found[row] = (told if isinstance(told, dict) else json.loads(told))["timings"]

        threads = [threading.Thread(target=ask, args=(row,)) for row in range(rows)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(timings["predicted_ms"] for timings in found.values()) / 1e3

    return write


def of_bound(path: str, dtype: str) -> Write:
    """Nothing but the products of a decoding step, each weight once, in one loop on the device."""
    import jax
    import jax.numpy as jnp

    from fastlm.exports import runtimes
    from fastlm.parallel import mesh

    restored = runtimes.restore("jax", path, mesh.make(), dtype=dtype or "float32")
    weights = [leaf for leaf in jax.tree.leaves(restored.params) if leaf.ndim == 2]

    def products(weights, rows):
        def body(carry, _):
            total = carry
            for weight in weights:
                wide = weight.shape[0] > weight.shape[1]  # a table multiplies by its rows
                x = jnp.broadcast_to(total, (rows, weight.shape[int(wide)]))
                y = jax.lax.dot_general(x, weight, (((1,), (int(wide),)), ((), ())))
                total = jnp.tanh(jnp.max(y)) * 1e-3
            return total, None

        return jax.lax.scan(body, jnp.float32(1), None, length=NEW)[0]

    run = jax.jit(products, static_argnums=1)

    def write(rows: int) -> float:
        begun = time.perf_counter()
        run(weights, rows).block_until_ready()
        return time.perf_counter() - begun

    return write


PROGRAMS = {
    "jax": of_jax,
    "onnx": of_onnx,
    "huggingface": of_huggingface,
    "llama": of_llama,
    "bound": of_bound,
}


def main() -> None:
    """Times the programs in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", action="append", required=True, help="KIND:PATH, several with commas")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = [name for several in asked.programs for name in several.split(",")]
    if asked.worker:
        kind, _, path = names[0].partition(":")
        kind, _, dtype = kind.partition("-")
        write = PROGRAMS[kind](path, dtype)
        workers.serve(lambda request: {"seconds": write(request["rows"])})
        return
    python = {"huggingface": asked.torch_python, "llama": asked.llama_python}
    running = {
        name: workers.Worker(
            __file__, "--worker", "--programs", name, python=python.get(name.split(":")[0].split("-")[0])
        )
        for name in names
    }
    try:
        for rows in map(int, asked.rows.split(",")):
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(asked.turns + 1):
                for name, worker in running.items():
                    found = worker.ask({"rows": rows})["seconds"]
                    seconds[name] += [found] if turn else []  # the first compiles
            print(f"\n| {rows} row{'s' * (rows > 1)} | tok/s | least - most | of the first |\n|---|---:|---:|---:|")
            for name in names:
                rates = [rows * NEW / value for value in seconds[name]]
                ratio = statistics.median(a / b for a, b in zip(seconds[names[0]], seconds[name]))
                print(
                    f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} - {max(rates):.0f} | {ratio:.2f}x |"
                )
            sys.stdout.flush()
    finally:
        workers.close(running.values())


if __name__ == "__main__":
    main()
