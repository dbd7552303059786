"""ONNX: a model's programs for ONNX Runtime, with the weights whole, in eight bits or in four.

    FOLDER/forward.onnx ...    one graph for each program of `programs`
    FOLDER/weights.data        the weights of all graphs
    FOLDER/signature.json      what goes in and comes out

Notable: rows, tokens and slots are symbols. A decoder whose caches are all kept by ONNX Runtime's own attention reads
prompts and single tokens with one graph, `prefill`, and has no `decode`, if the length of rows is open. See
`onnx_conversion` for how graphs come about, `onnx_operators` for what they consist of, `onnx_products` for formats,
`onnx_calibration` for ranges.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import onnx

from fastlm.exports import onnx_operators as operators
from fastlm.exports import tracing
from fastlm.exports.exported_programs import SIGNATURE
from fastlm.exports.onnx_conversion import DOMAIN, Converted, convert
from fastlm.exports.onnx_graph import DATA, Graph, Weights
from fastlm.exports.onnx_products import FORMATS, Products, Static
from fastlm.exports.onnx_session import NEXT
from fastlm.exports.programs import Program, flat, programs, told_of
from fastlm.models import Model

STATIC = "int8_static"
WEIGHTS = (*FORMATS, STATIC)
SUFFIX = ".onnx"
HOW_TO_RUN = """
## How to run it

    python -m fastlm.generate --runtime onnx --workdir . --prompt "..."
    python -m fastlm.evaluate --runtime onnx --workdir .

or, with nothing but ONNX Runtime:

```python
import json
import numpy as np
import onnxruntime

signature = json.load(open("signature.json"))["programs"]  # what goes in and comes out, with symbols for sizes
forward = onnxruntime.InferenceSession("forward.onnx")
print(forward.run(None, {name: np.ones((1, 8), np.int32) for name in signature["forward"]["inputs"]}))
```

A decoder writes with `prefill` and then `decode`, or with `prefill` alone, of one token, where there is no `decode`: a
cache begins as zeros in the shapes of `signature` (b rows, c slots: prompt and continuation together), and each call
takes as `cache/...` what the last gave as `next/cache/...`. Those named under `in_place` may be the same memory.
"""


def write(
    folder: Path,
    model: Model,
    params: Any,
    length: int | None = None,
    weights: str = "float32",
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> list[str]:
    """Writes a model into a folder and returns the names of the files.

    Args:
      length: tokens of a row, for models whose programs have a fixed number.
      weights: format of the weights, one of `WEIGHTS`.
      ranges: of the inputs of products, for `STATIC`; see `onnx_calibration`.

    Raises:
      UserError: the model needs `length`, keeps a cache that has no such form, or does what ONNX cannot say.
      ValueError: ranges are missing.
    """
    if weights == STATIC and ranges is None:
        raise ValueError(f"{STATIC} needs ranges")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    signature: dict[str, Any] = {"weights": weights, "programs": {}}
    products = Static(ranges) if weights == STATIC else FORMATS[weights]
    with Weights(folder / DATA, flat(params)) as written:
        for name, program in programs(model, shapes, length).items():
            if name == "decode" and length is None and _steps(signature["programs"]["prefill"]):
                continue
            graph, told = graph_of(name, program, flat(shapes), written, products, model.cfg.max_length)
            (folder / f"{name}{SUFFIX}").write_bytes(graph.SerializeToString())
            signature["programs"][name] = {"file": f"{name}{SUFFIX}", **told}
    return finish(folder, signature)


def finish(folder: Path, signature: dict[str, Any]) -> list[str]:
    """Writes the signature beside graphs and weights that are there; returns the names of all files."""
    files = [*(told["file"] for told in signature["programs"].values()), DATA]
    signature["sizes"] = {name: (folder / name).stat().st_size for name in files}
    (folder / SIGNATURE).write_text(json.dumps(signature, indent=1) + "\n")
    return [*files, SIGNATURE]


def _steps(prefill: dict[str, Any]) -> bool:
    """Whether a program that reads prompts also reads single tokens: it does nothing but attend by slot."""
    caches = {name for name in prefill["inputs"] if name.startswith("cache/")}
    return caches == {"cache/length", *prefill["in_place"]} and "source" not in prefill["inputs"]


def graph_of(
    name: str, program: Program, shapes: dict[str, Any], weights: Weights, products: Products, context: int
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Returns a program as a graph, and what the signature says of it."""
    with told_of(name):
        traced = tracing.flatten(program.call, (shapes, program.inputs), operators.takes)
    outputs = [f"{NEXT}{output}" if output in program.inputs else output for output in sorted(program.outputs)]
    converted = convert(traced, name, [*sorted(shapes), *sorted(program.inputs)], outputs)
    graph, by_slot = Graph(weights), set()
    writer = operators.Writer(graph, products, context)
    graph.keep(converted.model.graph.initializer)
    found = [(node, _operator(converted, node)) for node in converted.model.graph.node]
    writer.together = operators.siblings([operator for _, operator in found if operator is not None], weights)
    for node, operator in found:
        if operator is None:
            graph.keep_node(node)
            continue
        operators.LOWERINGS[operator.name].write(writer, operator)
        if operator.name == tracing.cached_attention.__qualname__:
            past = operator.arguments["past"]
            by_slot |= {past.keys, past.values}
    given = [value for value in converted.model.graph.input if value.name in program.inputs]
    made = list(converted.model.graph.output)
    caches = {key for key in program.inputs if key.startswith("cache/")}
    in_place = sorted(caches & by_slot)
    told = {
        "inputs": {value.name: _described(value) for value in given},
        "outputs": {value.name: _described(value) for value in made},
        "in_place": in_place,
    }
    return graph.model(name, given, made), told


def _operator(converted: Converted, node: onnx.NodeProto) -> operators.Node | None:
    """Returns what a node is as an operator."""
    if node.domain != DOMAIN:
        return None
    call, taken = converted.operators[node.op_type]
    shapes = dict(zip(node.input, taken, strict=True))
    return operators.Node(call.name, call.filled(node.input), shapes, tuple(node.output))


def _described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    told = value.type.tensor_type
    sizes = [dim.dim_param or dim.dim_value for dim in told.shape.dim]
    return {"shape": sizes, "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(told.elem_type))}
