"""What the inputs of products range over, found by having a model read data and watching.

Notable: the float32 export is what is watched, in ONNX Runtime, with the least and the largest value of each product's
input as further outputs of its graph; it reads as its own task does, so every family and every source will do.
Left out: clipping of rare large values, which costs some models accuracy and saves others.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import onnx
from jax.sharding import Mesh

from fastlm.errors import UserError
from fastlm.exports import onnx as onnx_format
from fastlm.exports.exported_model import ExportedModel
from fastlm.exports.onnx_graph import DATA, Weights
from fastlm.exports.onnx_products import Watched
from fastlm.exports.onnx_session import Programs
from fastlm.exports.programs import flat, programs
from fastlm.models import Model
from fastlm.training import quality
from fastlm.training.restore import Restored

Ranges = dict[str, tuple[float, float]]
FORWARD = "forward"


class _Watching(Programs):
    """Programs that keep the extremes of what they are asked for."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder)
        self.extremes = np.array([[np.inf, -np.inf]] * count)

    def call(self, name: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = list(self.signature[name]["outputs"])
        count = len(self.extremes)
        found = self.open(name).run([*outputs, *_extremes(count)], dict(given))
        seen = np.array(found[len(outputs) :]).reshape(2, count)
        self.extremes[:, 0] = np.minimum(self.extremes[:, 0], seen[0])
        self.extremes[:, 1] = np.maximum(self.extremes[:, 1], seen[1])
        return dict(zip(outputs, found))


def _extremes(count: int) -> list[str]:
    """Names of the outputs: all least values, then all largest ones."""
    return [f"{which}/{place}" for which in ("least", "largest") for place in range(count)]


def ranges(restored: Restored, model: Model, length: int | None, mesh: Mesh, asked: quality.Asked) -> Ranges:
    """Returns the range of the input of each product, by the paths of its weights.

    Args:
      model: the model as it is exported.
      length: tokens of every row, where that is fixed.
      asked: what is read, and how much of it.

    Raises:
      UserError: there is no data to read.
    """
    if not quality.data_of(restored, asked)[0].sources:
        raise UserError("ranges of inputs need data, and this model came without; give --source")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), restored.params)
    program, products = programs(model, shapes, length)[FORWARD], Watched()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Weights(folder / DATA, flat(restored.params)) as weights:
            graph, told = onnx_format.graph_of(FORWARD, program, flat(shapes), weights, products, model.cfg.max_length)
        names = _extremes(len(products.inputs))
        values = list(products.inputs.values()) * 2
        for place, (output, value) in enumerate(zip(names, values, strict=True)):
            kind = "ReduceMin" if place < len(products.inputs) else "ReduceMax"
            graph.graph.node.append(onnx.helper.make_node(kind, [value], [output], keepdims=0))
            graph.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, []))
        file = f"{FORWARD}{onnx_format.SUFFIX}"
        (folder / file).write_bytes(graph.SerializeToString())
        onnx_format.finish(folder, {"programs": {FORWARD: {"file": file, **told}}})
        watching = _Watching(folder, len(products.inputs))
        watched = ExportedModel(model.cfg, model.compute, watching)
        quality.read(dataclasses.replace(restored, model=watched, params={}), mesh, asked)
    return {name: (float(low), float(high)) for name, (low, high) in zip(products.inputs, watching.extremes)}
