"""How weights multiply in ONNX Runtime: whole, in eight bits, or in four.

    float32       MatMul, on the weights as they are.
    int8          DynamicQuantizeMatMul: eight bits with one scale per output; inputs are rounded as they come.
    int8_static   the same weights; inputs are rounded in ranges found beforehand (QuantizeLinear, DequantizeLinear).
    int8_blocks   MatMulNBits: eight bits with one scale for 64 inputs; inputs are rounded to eight bits in each block.
    int4          MatMulNBits: four bits with one scale for 32 inputs; inputs are rounded in the same way.

Notable: products of the same input (queries, keys and values; gate and up) are one. A table that is also looked up in
is stored once: rows of the eight-bit one are columns of the product's, those of the four-bit one its packed rows.
Scales of four-bit blocks are those, of a few near the block's largest value, with the least squared error.
Left out: float16, which CPUs widen; four-bit zero points, which cost more bytes than finer scales gain.

Dims: I input, O output.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fastlm.exports.onnx_graph import Arrays, Graph

MICROSOFT = "com.microsoft"
ROUNDS_TO_INT8 = 4  # MatMulNBits' accuracy level


class Products(Protocol):
    """A format of weights."""

    def product(self, graph: Graph, x: str, weights: Sequence[str], transpose: bool, out: str) -> str:
        """Adds the product of `x` with weights [I, O], or [O, I] if transposed, side by side along O."""

    def lookup(self, graph: Graph, weight: str, ids: str, out: str) -> str:
        """Adds the rows `ids` of a weight [V, D]."""


def _beside(transpose: bool, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns weights side by side as [I, O]."""
    return np.concatenate([array.T if transpose else array for array in arrays], axis=1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Float32:
    """Weights as they are."""

    def product(self, graph: Graph, x: str, weights: Sequence[str], transpose: bool, out: str) -> str:
        """See `Products`."""
        if transpose and len(weights) == 1:
            return graph.node("FusedMatMul", x, *weights, out=out, domain=MICROSOFT, transB=1)
        (name,) = graph.weight(weights, "", lambda *arrays: {"": _beside(transpose, arrays)})
        return graph.node("MatMul", x, name, out=out)

    def lookup(self, graph: Graph, weight: str, ids: str, out: str) -> str:
        """See `Products`."""
        return graph.node("Gather", weight, ids, out=out)


@dataclasses.dataclass(frozen=True)
class Int8:
    """Eight bits, symmetric, a scale for each output."""

    def product(self, graph: Graph, x: str, weights: Sequence[str], transpose: bool, out: str) -> str:
        """See `Products`."""
        values, scales = graph.weight(weights, ":int8", lambda *arrays: int8_columns(_beside(transpose, arrays)))
        return graph.node("DynamicQuantizeMatMul", x, values, scales, out=out, domain=MICROSOFT)

    def lookup(self, graph: Graph, weight: str, ids: str, out: str) -> str:
        """See `Products`."""
        values, scales = graph.weight([weight], ":int8", lambda table: int8_columns(table.T.astype(np.float32)))
        rows = graph.node("Transpose", graph.node("Gather", values, ids, axis=1), perm=(1, 2, 0))
        scale = graph.node("Unsqueeze", graph.node("Gather", scales, ids), graph.constant([-1], np.int64))
        return graph.node("Mul", graph.node("Cast", rows, to=1), scale, out=out)


@dataclasses.dataclass(frozen=True)
class Static:
    """Eight bits, and inputs in ranges that `onnx_calibration` found."""

    ranges: Mapping[str, tuple[float, float]]

    def product(self, graph: Graph, x: str, weights: Sequence[str], transpose: bool, out: str) -> str:
        """See `Products`."""
        low, high = self.ranges["+".join(weights)]
        low, high = min(low, 0.0), max(high, 0.0)  # nothing stays nothing
        scale = (high - low) / 255 or 1.0
        grid = graph.constant(scale, np.float32), graph.constant(round(-low / scale), np.uint8)
        rounded = graph.once("DequantizeLinear", graph.once("QuantizeLinear", x, *grid), *grid)
        values, scales = graph.weight(weights, ":int8", lambda *arrays: int8_columns(_beside(transpose, arrays)))
        return graph.node("MatMul", rounded, graph.node("DequantizeLinear", values, scales, axis=1), out=out)

    def lookup(self, graph: Graph, weight: str, ids: str, out: str) -> str:
        """See `Products`."""
        return Int8().lookup(graph, weight, ids, out)


@dataclasses.dataclass(frozen=True)
class Watched(Float32):
    """Weights as they are; remembers what is multiplied.

    Attributes:
      inputs: of each product, by its weights, the name of its input.
    """

    inputs: dict[str, str] = dataclasses.field(default_factory=dict)

    def product(self, graph: Graph, x: str, weights: Sequence[str], transpose: bool, out: str) -> str:
        """See `Products`."""
        self.inputs["+".join(weights)] = x
        return super().product(graph, x, weights, transpose, out)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Four or eight bits, symmetric, a scale for each block of inputs."""

    bits: int
    block: int

    def product(self, graph: Graph, x: str, weights: Sequence[str], transpose: bool, out: str) -> str:
        """See `Products`."""
        values, scales = graph.weight(weights, self._suffix, lambda *arrays: self.pack(_beside(transpose, arrays).T))
        shapes = [graph.weights.shape(weight) for weight in weights]
        inputs, outputs = shapes[0][int(transpose)], sum(shape[1 - int(transpose)] for shape in shapes)
        sizes = {"K": inputs, "N": outputs, "bits": self.bits, "block_size": self.block}
        sizes["accuracy_level"] = ROUNDS_TO_INT8
        return graph.node("MatMulNBits", x, values, scales, out=out, domain=MICROSOFT, **sizes)

    def lookup(self, graph: Graph, weight: str, ids: str, out: str) -> str:
        """See `Products`."""
        rows, width = graph.weights.shape(weight)
        if width % self.block:  # the runtime's lookup takes whole blocks only
            return graph.node("Gather", weight, ids, out=out)
        values, scales = graph.weight([weight], self._suffix, lambda table: self.pack(table.astype(np.float32)))
        flat = graph.once("Reshape", values, graph.constant([rows, width * self.bits // 8], np.int64))
        scales = graph.once("Reshape", scales, graph.constant([rows, -1], np.int64))
        options = {"bits": self.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 1}
        return graph.node("GatherBlockQuantized", flat, ids, scales, out=out, domain=MICROSOFT, **options)

    def pack(self, weight: np.ndarray) -> Arrays:
        """Returns a weight [O, I] as MatMulNBits reads it.

        Returns:
          levels counted from the lowest, one in a byte or two, the first one low: [O, blocks, bytes of a block] uint8;
          scales [O, blocks], float32. I is filled up with zeros.
        """
        rows, inputs = weight.shape
        blocks, half = -(-inputs // self.block), 1 << self.bits - 1
        padded = np.zeros((rows, blocks * self.block), np.float32)
        padded[:, :inputs] = weight
        values = np.empty((rows, blocks, self.block * self.bits // 8), np.uint8)
        scales = np.empty((rows, blocks), np.float32)
        step = max(1, (1 << 22) // padded.shape[1])  # so many rows fit the cache together with what is made of them
        for begin in range(0, rows, step):
            piece = padded[begin : begin + step].reshape(-1, blocks, self.block)
            scale = self._best_scales(piece)
            scales[begin : begin + step] = scale
            levels = (self._levels(piece, scale) + half).astype(np.uint8)
            values[begin : begin + step] = levels if self.bits == 8 else levels[..., 0::2] | levels[..., 1::2] << 4
        return {"": values, ":scale": scales}

    @property
    def _suffix(self) -> str:
        return f":int{self.bits}x{self.block}"

    def _levels(self, blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
        half = 1 << self.bits - 1
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        return np.clip(np.rint(blocks * inverse[..., None]), -half, half - 1).astype(np.int16)

    def _best_scales(self, blocks: np.ndarray) -> np.ndarray:
        """Returns the scale of each block: of those that put its largest value at or near the end, the best."""
        half = 1 << self.bits - 1
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
        best = largest / np.float32(-half)
        if self.bits == 8:  # so fine that the end is best
            return best
        least = np.square(self._levels(blocks, best) * best[..., None] - blocks).sum(-1)
        for level in (-7.5, -7.0, -8.5, -9.0):
            scale = largest / np.float32(level)
            error = np.square(self._levels(blocks, scale) * scale[..., None] - blocks).sum(-1)
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
        return best


def int8_columns(weight: np.ndarray) -> Arrays:
    """Returns a weight [I, O] as integers from -127 to 127 and a scale for each O."""
    scale = np.abs(weight).max(axis=0) / np.float32(127)
    scale[scale == 0] = 1
    return {"": np.rint(weight / scale).astype(np.int8), ":scale": scale.astype(np.float32)}


FORMATS: dict[str, Products] = {
    "float32": Float32(),
    "int8": Int8(),
    "int8_blocks": Blocks(8, 64),
    "int4": Blocks(4, 32),
}
