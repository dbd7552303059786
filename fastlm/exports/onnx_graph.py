"""A graph under construction: nodes, small constants, and weights that lie in a file beside it.

Notable: weights are written once into one file that all graphs of an export share, each in the form in which a node
wants it, one at a time: never is more than one of them in memory twice. Readers map the file, so large tensors begin at
pages. Protocol buffers end at 2 GB; graphs hold no weights and stay small.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

PAGE, ALIGNED = 4096, 64
LARGE = 1 << 20  # bytes from which a tensor begins at a page
DATA = "weights.data"
OPSETS = {"": 23, "com.microsoft": 1}
IR_VERSION = 10

Arrays = Mapping[str, np.ndarray]


class Weights:
    """The file of weights, and what stands where in it."""

    def __init__(self, path: Path, params: Mapping[str, Any]) -> None:
        """Opens the file.

        Args:
          params: weights by path, arrays or what numpy makes arrays of.
        """
        self._file = path.open("wb")
        self._params = params
        self._written: dict[str, list[onnx.TensorProto]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._params

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a weight."""
        return tuple(self._params[name].shape)

    def form(self, names: Sequence[str], suffix: str, make: Callable[..., Arrays]) -> list[onnx.TensorProto]:
        """Returns tensors made of weights, written when first asked for.

        Args:
          suffix: names the form; the same form of the same weights is there once.
          make: takes the weights as arrays and returns the tensors by further suffixes.
        """
        key = "+".join(names) + suffix
        if key not in self._written:
            made = make(*(np.asarray(self._params[name]) for name in names))
            self._written[key] = [self._write(key + part, array) for part, array in made.items()]
        return self._written[key]

    def _write(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        array = np.ascontiguousarray(array)
        self._file.write(bytes(-self._file.tell() % (PAGE if array.nbytes >= LARGE else ALIGNED)))
        told = {"location": DATA, "offset": self._file.tell(), "length": array.nbytes}
        self._file.write(array.data)
        tensor = onnx.TensorProto(
            name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), data_location=1
        )
        tensor.external_data.extend(
            onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in told.items()
        )
        return tensor


class Graph:
    """Nodes in order, and what they read that no node gives."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple, str] = {}
        self._made: dict[tuple, str] = {}
        self._count = 0

    def fresh(self, name: str) -> str:
        """Returns a name that is not taken."""
        self._count += 1
        return f"{name}_{self._count}"

    def node(self, kind: str, *inputs: str, out: str | Sequence[str] = "", domain: str = "", **attributes: Any) -> str:
        """Adds a node and returns its (first) output.

        Args:
          inputs: names; "" for one that is left out; a weight's path for the weight as it is.
          out: name of the output, or of all of them; by default a new one.
        """
        self._keep_weights(inputs)
        names = [out or self.fresh(kind)] if isinstance(out, str) else list(out)
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def taken_back(self, value: str) -> onnx.NodeProto | None:
        """Removes the node that gives a value and returns it; None if others have read that already."""
        for place in reversed(range(len(self.nodes))):
            if value in self.nodes[place].output:
                return self.nodes.pop(place)
            if value in self.nodes[place].input:
                return None
        return None

    def once(self, kind: str, *inputs: str, **options: Any) -> str:
        """Adds a node unless there is the same one already; returns its output."""
        key = (kind, inputs, tuple(sorted(options.items())))
        if key not in self._made:
            self._made[key] = self.node(kind, *inputs, **options)
        return self._made[key]

    def constant(self, value: Any, dtype: Any) -> str:
        """Returns the name of a small constant."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, names: Sequence[str], suffix: str, make: Callable[..., Arrays]) -> list[str]:
        """Returns the names of tensors made of weights; see `Weights.form`."""
        tensors = self.weights.form(names, suffix, make)
        self._initializers.update((tensor.name, tensor) for tensor in tensors)
        return [tensor.name for tensor in tensors]

    def keep(self, initializers: Iterable[onnx.TensorProto]) -> None:
        """Takes over constants of another graph."""
        self._initializers.update((tensor.name, tensor) for tensor in initializers)

    def keep_node(self, node: onnx.NodeProto) -> None:
        """Takes over a node of another graph; weights that it reads are kept as they are."""
        self._keep_weights(node.input)
        self.nodes.append(node)

    def _keep_weights(self, inputs: Iterable[str]) -> None:
        for name in inputs:
            if name in self.weights:
                self.weight([name], "", lambda array: {"": array})

    def model(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> onnx.ModelProto:
        """Returns the whole; nodes whose results nobody reads are left out.

        Args:
          inputs, outputs: `onnx.ValueInfoProto`s.
        """
        nodes, read = [], {value.name for value in outputs}
        for node in reversed(self.nodes):
            if read & set(node.output):
                nodes.append(node)
                read |= set(node.input)
        kept = [tensor for tensor in self._initializers.values() if tensor.name in read]
        graph = helper.make_graph(nodes[::-1], name, inputs, outputs, kept)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fastlm")
