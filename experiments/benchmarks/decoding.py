"""One model run by many programs, all taking turns: tokens a second written greedily behind a prompt, or read.

    launch/local.sh -m experiments.benchmarks.decoding --programs jax:runs/smollm2,onnx:exported/int4 \\
        [--programs huggingface:FOLDER,llama:FILE.gguf --torch-python PYTHON --llama-python PYTHON]
    launch/local.sh -m experiments.benchmarks.decoding --read 128 --programs jax:runs/minilm,onnx:exported/minilm

Programs: `jax` (a workdir, float32; `jax-bfloat16` and `jax-float16` compute in these, `jax-fused` has fused products,
`jax-int8` keeps its cache in eight bits, `jax-rounded` has fused products and weights in eight bits), `onnx` (what
fastlm.export wrote), `huggingface` (transformers on a folder; `huggingface-bfloat16`), `llama` (llama.cpp, by the
package xllamacpp, on a .gguf file), `bound`: nothing but XLA's products in float32 of all weights with as many rows,
and `bound-onnx`: nothing but the products with weights of what fastlm.export wrote, in ONNX Runtime. Each lives in a
process of its own. A turn is a prompt (--prompt) read and 128 tokens written by each program in turn, of which only
writing counts; with `--read LENGTH`, rows of so many tokens read, up to the logits of the next one, or by an encoder to
its last hidden states. Medians over turns, ratios to the first program. Six programs take five minutes on two cores.
Notable: other interpreters import nothing but what this file names, and the standard library.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fastlm.measurement import workers

NEW = 128  # tokens written to each row
Seconds = Callable[[int, int], float]  # from rows and tokens of each, the seconds that reading or writing takes


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs a model: `write(rows, prompt)` and `read(rows, length)`, in seconds; None for what it cannot do."""

    write: Seconds | None = None
    read: Seconds | None = None


def of_jax(path: str, option: str) -> Program:
    """Our own decoding in XLA."""
    from fastlm.exports import runtimes
    from fastlm.parallel import mesh

    options = {"dtype": option if option in ("bfloat16", "float16") else "float32"}
    options |= {"cache_dtype": "int8"} if option == "int8" else {}
    options |= {"fused": option in ("fused", "rounded"), "weights": "int8" if option == "rounded" else None}
    return _timed("jax", runtimes.restore("jax", path, mesh.make(), **options))


def of_onnx(path: str, option: str) -> Program:
    """An export in ONNX Runtime, by our loop."""
    del option
    from fastlm.exports import runtimes
    from fastlm.parallel import mesh

    return _timed("onnx", runtimes.restore("onnx", path, mesh.make()))


def _timed(runtime: str, restored: Any) -> Program:
    from fastlm.exports import runtimes

    timed = runtimes.timed(runtime, restored, None)
    return Program(lambda rows, prompt: sum(timed.write(rows, prompt, NEW)), timed.read)


def of_huggingface(path: str, option: str) -> Program:
    """transformers; writing is what 129 tokens take `generate` more than one."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    writes = any("CausalLM" in name for name in config.architectures or ())
    kind = transformers.AutoModelForCausalLM if writes else transformers.AutoModel
    model = kind.from_pretrained(path, dtype=getattr(torch, option or "float32")).eval()
    tokens_of = lambda rows, length: torch.arange(100, 100 + rows * length).reshape(rows, length) % config.vocab_size

    def read(rows: int, length: int) -> float:
        tokens, last = tokens_of(rows, length), {"logits_to_keep": 1} if writes else {}
        begun = time.perf_counter()
        with torch.inference_mode():
            model(tokens, attention_mask=torch.ones_like(tokens), **last)
        return time.perf_counter() - begun

    def seconds(rows: int, length: int, new: int) -> float:
        tokens = tokens_of(rows, length)
        options = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(tokens, min_new_tokens=new, max_new_tokens=new, **options)
        return time.perf_counter() - begun

    return Program(lambda rows, prompt: seconds(rows, prompt, NEW + 1) - seconds(rows, prompt, 1), read)


def of_llama(path: str, option: str) -> Program:
    """llama.cpp's server, asked by as many threads as there are rows; its own clock tells reading from writing."""
    del option
    import xllamacpp

    servers = {}

    def server(rows: int, prompt: int):
        if (rows, prompt) not in servers:
            options = xllamacpp.CommonParams()
            options.model.path, options.n_parallel, options.n_ctx = path, rows, 2 * (prompt + NEW) * rows
            options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 2
            options.n_gpu_layers, options.verbosity = 0, 0
            servers[rows, prompt] = xllamacpp.Server(options)
        return servers[rows, prompt]

    def longest(rows: int, prompt: int, what: str) -> float:
        found: dict[int, dict] = {}

        def ask(row: int) -> None:
            request = {"prompt": list(range(100 + row, 100 + row + prompt)), "n_predict": NEW, "temperature": 0.0}
            told = server(rows, prompt).handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
            found[row] = (told if isinstance(told, dict) else json.loads(told))["timings"]

        threads = [threading.Thread(target=ask, args=(row,)) for row in range(rows)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return max(timings[what] for timings in found.values()) / 1e3

    return Program(
        lambda rows, prompt: longest(rows, prompt, "predicted_ms"),
        lambda rows, length: longest(rows, length, "prompt_ms"),
    )


def of_bound(path: str, option: str) -> Program:
    """Nothing but the products of a decoding step, each weight once, in one loop on the device; or in ONNX Runtime."""
    if option == "onnx":
        return _products_of_onnx(path)
    import jax
    import jax.numpy as jnp

    from fastlm.exports import runtimes
    from fastlm.parallel import mesh

    restored = runtimes.restore("jax", path, mesh.make(), dtype=option or "float32")
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

    def write(rows: int, prompt: int) -> float:
        del prompt
        begun = time.perf_counter()
        run(weights, rows).block_until_ready()
        return time.perf_counter() - begun

    return Program(write)


def _products_of_onnx(path: str) -> Program:
    """The nodes of a step that multiply by weights, each with numbers of its own instead of the node before it."""
    import tempfile
    from pathlib import Path

    import numpy as np
    import onnx
    import onnxruntime

    from fastlm.exports.onnx_session import Programs

    programs = Programs(path)
    file = programs.signature["decode" if programs.has("decode") else "prefill"]["file"]
    model = onnx.load(Path(path) / file, load_external_data=False)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, widths = [], set()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            width = next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "K")
        elif node.op_type == "MatMul" and node.input[1] in weights:
            width = weights[node.input[1]].dims[0]
        else:
            continue
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        nodes[-1].input[0], nodes[-1].output[0] = f"x{width}", f"y{len(nodes)}"
        widths.add(width)
    if not nodes:
        sys.exit(f"{path}: has no products of one node (MatMul, MatMulNBits) to time alone")
    used = {name for node in nodes for name in node.input}
    value = lambda name, *shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph(
        nodes,
        "products",
        [value(f"x{width}", "rows", width) for width in sorted(widths)],
        [value(node.output[0], "rows", None) for node in nodes],
        [tensor for name, tensor in weights.items() if name in used],
    )
    options = {"opset_imports": model.opset_import, "ir_version": model.ir_version}
    with tempfile.NamedTemporaryFile(dir=path, suffix=".onnx") as alone:  # beside the weights that it names
        onnx.save(onnx.helper.make_model(graph, **options), alone.name)
        session = onnxruntime.InferenceSession(alone.name)
    random = np.random.default_rng(0)

    def write(rows: int, prompt: int) -> float:
        del prompt
        binding = session.io_binding()
        for width in widths:
            binding.bind_cpu_input(f"x{width}", random.normal(size=(rows, width)).astype(np.float32))
        for node in nodes:
            binding.bind_output(node.output[0])
        begun = time.perf_counter()
        for _ in range(NEW):
            session.run_with_iobinding(binding)
        return time.perf_counter() - begun

    return Program(write)


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
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--read", type=int, default=0, metavar="LENGTH", help="read rows of so many tokens")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = [name for several in asked.programs for name in several.split(",")]
    if asked.worker:
        kind, _, path = names[0].partition(":")
        kind, _, option = kind.partition("-")
        program = PROGRAMS[kind](path, option)
        workers.serve(lambda request: {"seconds": getattr(program, request["what"])(*request["load"])})
        return
    what, length, count = ("read", asked.read, asked.read) if asked.read else ("write", asked.prompt, NEW)
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
                    found = worker.ask({"what": what, "load": [rows, length]})["seconds"]
                    seconds[name] += [found] if turn else []  # the first compiles
            print(f"\n| {what}, {rows} x {length} | tok/s | least - most | of the first |\n|---|---:|---:|---:|")
            for name in names:
                rates = [rows * count / value for value in seconds[name]]
                ratio = statistics.median(a / b for a, b in zip(seconds[names[0]], seconds[name]))
                print(
                    f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f} - {max(rates):.0f} | {ratio:.2f}x |"
                )
            sys.stdout.flush()
    finally:
        workers.close(running.values())


if __name__ == "__main__":
    main()
