"""What each operator is in ONNX Runtime: the table that says which it takes, and the nodes that it writes for them.

Notable: attention over a cache is GroupQueryAttention, which rotates, writes and attends at once and keeps its cache as
[B, K, S, H]; other causal attention is the same without a cache; attention that leaves out padding is
MultiHeadAttention. What an entry does not take is written out in plain operations.
Left out: types other than float32.

Dims: B batch, T time, S slots, N heads, K kv heads, H head dim.
"""

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fastlm.exports import tracing
from fastlm.exports.onnx_graph import Graph
from fastlm.exports.onnx_products import MICROSOFT, Products
from fastlm.models import positions
from fastlm.ops import activations, attention, caches, contract, normalization
from fastlm.ops.operators import Call
from fastlm.ops.softmax import Exact

INT32, INT64 = 6, 7  # of onnx.TensorProto


@dataclasses.dataclass(frozen=True)
class Node:
    """An operator in the graph to be written.

    Attributes:
      name: of the operator.
      arguments: of the call, names of values in the place of slots.
      shapes: of those values, by name.
      out: names of its results.
    """

    name: str
    arguments: dict[str, Any]
    shapes: dict[str, tuple[Any, ...]]
    out: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Lowering:
    """How an operator is written.

    Attributes:
      takes: whether it can be, of its arguments with shapes in the place of slots.
      write: adds it to the graph.
    """

    takes: Callable[[dict[str, Any]], bool]
    write: Callable[["Writer", Node], None]


@dataclasses.dataclass
class Writer:
    """What is being written, and how.

    Attributes:
      products: how weights multiply.
      context: positions that rotations are tabled for.
      sums: pairs that were added, by what they gave; a norm may take them over.
      joined: heads side by side, by the same told apart.
      sizes: of axes, by symbol.
      together: products of one input that are written as one, by their results.
      parts: what was one product, and which part of it, by name.
    """

    graph: Graph
    products: Products
    context: int
    sums: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    joined: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: dict[str, str] = dataclasses.field(default_factory=dict)
    together: dict[str, list[Node]] = dataclasses.field(default_factory=dict)
    parts: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)

    def size(self, value: str, axis: int, size: Any) -> str:
        """Returns a size of a value as int32; the same symbol is the same value everywhere."""
        if isinstance(size, int):
            return self.graph.constant(size, np.int32)
        if str(size) not in self.sizes:
            found = self.graph.node("Cast", self.graph.node("Shape", value, start=axis, end=axis + 1), to=INT32)
            self.sizes[str(size)] = self.graph.node("Squeeze", found)
        return self.sizes[str(size)]

    def packed(self, given: Sequence[str]) -> Sequence[str]:
        """Returns queries, keys and values as they lie side by side in one product, if they do."""
        parts = [self.parts.get(name, ("", 0)) for name in given]
        whole = parts[0][0]
        return [whole, "", ""] if whole and parts == [(whole, place) for place in range(3)] else given


def takes(call: Call, shapes: Sequence[Any]) -> bool:
    """Returns whether an operator is one here; see `tracing.flatten`."""
    found = LOWERINGS.get(call.name)
    return found is not None and found.takes(call.filled(shapes))


def _is_float(*values: Any) -> bool:
    return all(value.dtype == jnp.float32 for value in values)


def _takes_contract(told: dict[str, Any]) -> bool:
    wanted = told["dtype"] is None or told["dtype"] == jnp.float32
    return hasattr(told["w"], "dtype") and wanted and _is_float(told["x"], told["w"])


def siblings(nodes: Sequence[Node], weights: Container[str]) -> dict[str, list[Node]]:
    """Returns products of the same input with different weights, by their results."""
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        told = node.arguments
        if node.name == contract.contract.__qualname__ and told["w"] in weights and not told["transpose"]:
            groups.setdefault(told["x"], []).append(node)
    return {node.out[0]: group for group in groups.values() if len(group) > 1 for node in group}


def _write_contract(writer: Writer, node: Node) -> None:
    told, graph = node.arguments, writer.graph
    if told["w"] not in graph.weights:
        graph.node("FusedMatMul", told["x"], told["w"], out=node.out, domain=MICROSOFT, transB=int(told["transpose"]))
        return
    group = writer.together.get(node.out[0])
    if group is None:
        writer.products.product(graph, told["x"], [told["w"]], told["transpose"], node.out[0])
    elif group[0] is node:
        names = [one.arguments["w"] for one in group]
        whole = graph.fresh("together")
        writer.products.product(graph, told["x"], names, False, whole)
        widths = graph.constant([graph.weights.shape(name)[1] for name in names], np.int64)
        graph.node("Split", whole, widths, out=[one.out[0] for one in group], axis=-1)
        writer.parts.update({one.out[0]: (whole, place) for place, one in enumerate(group)})


def _takes_lookup(told: dict[str, Any]) -> bool:
    return hasattr(told["w"], "dtype") and _is_float(told["w"]) and told["dtype"] == jnp.float32


def _write_lookup(writer: Writer, node: Node) -> None:
    table, ids = node.arguments["w"], node.arguments["ids"]
    if table in writer.graph.weights:
        writer.products.lookup(writer.graph, table, ids, node.out[0])
    else:
        writer.graph.node("Gather", table, ids, out=node.out)


def _takes_norm(told: dict[str, Any]) -> bool:
    wanted = told["dtype"] is None or told["dtype"] == jnp.float32
    return wanted and told["scale"] is not None and _is_float(told["x"])


def _write_add(writer: Writer, node: Node) -> None:
    x, y = node.arguments["x"], node.arguments["y"]
    writer.graph.node("Add", x, y, out=node.out)
    if len(node.shapes[x]) == 3:
        writer.sums[node.out[0]] = x, y


def _write_add_bias(writer: Writer, node: Node) -> None:
    writer.graph.node("Add", node.arguments["x"], node.arguments["bias"], out=node.out)


def _write_norm(writer: Writer, node: Node, alone: str, behind_sum: str, given: list[str]) -> None:
    """Writes a norm together with the sum that it reads, where there is one."""
    graph, x, options = writer.graph, node.arguments["x"], {"epsilon": node.arguments["epsilon"]}
    pair = writer.sums.pop(x, None)
    if pair is not None and graph.taken_back(x) is not None:
        graph.node(behind_sum, *pair, *given, out=(*node.out, "", "", x), domain=MICROSOFT, **options)
    else:
        graph.node(alone, x, *given, out=node.out, axis=-1, **options)


def _write_rms_norm(writer: Writer, node: Node) -> None:
    given = [node.arguments["scale"]]
    _write_norm(writer, node, "RMSNormalization", "SkipSimplifiedLayerNormalization", given)


def _write_layer_norm(writer: Writer, node: Node) -> None:
    given = [node.arguments[name] for name in ("scale", "bias") if node.arguments[name]]
    _write_norm(writer, node, "LayerNormalization", "SkipLayerNormalization", given)


def _write_pad(writer: Writer, node: Node) -> None:
    told = node.arguments
    pads = writer.graph.constant(told["pads"], np.int64)
    writer.graph.node("Pad", told["x"], pads, told["value"], out=node.out)


def _write_remainder(writer: Writer, node: Node) -> None:
    writer.graph.node("Mod", node.arguments["x"], node.arguments["y"], out=node.out, fmod=1)


def _write_select(writer: Writer, node: Node) -> None:
    told, graph = node.arguments, writer.graph
    chosen = graph.node("And", told["which"], told["chosen"])
    otherwise = graph.node("And", graph.node("Not", told["which"]), told["otherwise"])
    graph.node("Or", chosen, otherwise, out=node.out)


def _write_reshape(writer: Writer, node: Node) -> None:
    told = node.arguments
    before, sizes = node.shapes[told["x"]], writer.graph.constant(told["sizes"], np.int64)
    if len(before) == 4 and len(told["sizes"]) == 3 and told["x"] in writer.joined:
        writer.graph.node("Identity", writer.joined[told["x"]], out=node.out)
        return
    writer.graph.node("Reshape", told["x"], sizes, out=node.out)
    if len(before) == 3 and len(told["sizes"]) == 4:
        writer.joined[node.out[0]] = told["x"]


def _write_swiglu(writer: Writer, node: Node) -> None:
    gate = writer.graph.node("QuickGelu", node.arguments["gate"], domain=MICROSOFT, alpha=1.0)
    writer.graph.node("Mul", gate, node.arguments["x"], out=node.out)


def _takes_attention(told: dict[str, Any]) -> bool:
    q, k, v, mask = told["q"], told["k"], told["v"], told["mask"]
    if not _is_float(q, k, v) or told["softmax"] != Exact() or v.shape != k.shape or mask.offset is not None:
        return False
    if _is_grouped(mask, told["bias"], q.shape[3]):
        return True
    if q.shape[2] != k.shape[2] or told["cap"]:
        return False
    return mask.query_segments is None or (not mask.causal and not mask.packed)


def _is_grouped(mask: Any, bias: Any, width: int) -> bool:
    """Whether GroupQueryAttention takes it: causal, of whole rows, with heads of a width that it has a form for."""
    return mask.causal and mask.query_segments is None and bias is None and width % 8 == 0


def _write_attention(writer: Writer, node: Node) -> None:
    told, graph, mask = node.arguments, writer.graph, node.arguments["mask"]
    _, _, heads, width = node.shapes[told["q"]]
    kv_heads = node.shapes[told["k"]][2]

    def joined(name: str, count: int) -> str:
        sizes = graph.constant([0, 0, count * width], np.int64)
        return writer.joined.get(name) or graph.once("Reshape", name, sizes)

    q, k, v = joined(told["q"], heads), joined(told["k"], kv_heads), joined(told["v"], kv_heads)
    sizes = {"num_heads": heads, "scale": told["scale"], "domain": MICROSOFT}
    if _is_grouped(mask, told["bias"], width):
        y = _write_causal(writer, [q, k, v], node.shapes[told["q"]][:2], kv_heads, sizes | {"softcap": told["cap"]}, [])
    else:
        real = "" if mask.key_segments is None else _real(graph, mask.key_segments)
        bias = told["bias"] or ""
        sizes["unidirectional"] = int(mask.causal)
        y = graph.node("MultiHeadAttention", q, k, v, "", real, bias, **sizes)
    graph.node("Reshape", y, graph.constant([0, 0, heads, width], np.int64), out=node.out)
    writer.joined[node.out[0]] = y


def _write_causal(
    writer: Writer,
    given: Sequence[str],
    sizes: Sequence[Any],
    kv_heads: int,
    options: dict[str, Any],
    tables: list[str],
) -> str:
    """Writes causal attention of whole rows [B, T, NH]; returns what it gives."""
    graph = writer.graph
    rows, length = (writer.size(given[0], axis, size) for axis, size in enumerate(sizes))
    rows = graph.once("Unsqueeze", graph.once("Cast", rows, to=INT64), graph.constant([0], np.int64))
    last = graph.once("Expand", graph.once("Sub", length, graph.constant(1, np.int32)), rows)
    names = [graph.fresh(name) for name in ("attended", "keys", "values")]
    options |= {"kv_num_heads": kv_heads, "do_rotary": int(bool(tables))}
    return graph.node("GroupQueryAttention", *writer.packed(given), "", "", last, length, *tables, out=names, **options)


def _write_rotated(writer: Writer, node: Node) -> None:
    told = node.arguments
    given = [told["q"], told["k"], told["v"]]
    heads, kv_heads = (node.shapes[name][2] // told["width"] for name in given[:2])
    options = {"num_heads": heads, "scale": told["scale"], "softcap": told["cap"], "domain": MICROSOFT}
    tables = _tables(writer, told["rotary"])
    y = _write_causal(writer, given, node.shapes[told["q"]][:2], kv_heads, options, tables)
    writer.graph.node("Identity", y, out=node.out)


def _real(graph: Graph, segments: str) -> str:
    """Returns 1 where a key is real and 0 where it is padding."""
    padding = graph.once("Equal", segments, graph.constant(0, np.int32))
    return graph.once("Cast", graph.once("Not", padding), to=INT32)


def _takes_width(told: dict[str, Any]) -> bool:
    """Whether the runtime's attention over a cache, and its rotation, take heads of this width."""
    return told["width"] % (8 if told["rotary"] is None else 16) == 0


def _write_cached(writer: Writer, node: Node) -> None:
    told, graph = node.arguments, writer.graph
    past, width = told["past"], told["width"]
    kv_heads = node.shapes[past.keys][1]
    start, count = told["start"], writer.size(told["q"], 1, node.shapes[told["q"]][1])
    real = told["lengths"] or count
    last = graph.once("Sub", graph.once("Add", start, real), graph.constant(1, np.int32))
    total = graph.once("Add", graph.once("ReduceMax", start, keepdims=0), count)
    tables = [] if told["rotary"] is None else _tables(writer, told["rotary"])
    graph.node(
        "GroupQueryAttention",
        *(*writer.packed([told["q"], told["k"], told["v"]]), past.keys, past.values, last, total, *tables),
        out=node.out,
        domain=MICROSOFT,
        num_heads=node.shapes[told["q"]][2] // width,
        kv_num_heads=kv_heads,
        scale=told["scale"],
        softcap=told["cap"],
        do_rotary=int(bool(tables)),
    )


def _takes_written(told: dict[str, Any]) -> bool:
    return told["new"].dtype == told["slots"].dtype


def _write_written(writer: Writer, node: Node) -> None:
    told, graph = node.arguments, writer.graph
    rows, slots = _rows_and_slots(writer, node)
    _scatter(graph, told["slots"], [graph.once("Expand", rows, graph.once("Shape", slots)), slots], told["new"], node)


def _write_written_by_head(writer: Writer, node: Node) -> None:
    told, graph = node.arguments, writer.graph
    rows, slots = (graph.once("Unsqueeze", x, graph.constant([1], np.int64)) for x in _rows_and_slots(writer, node))
    heads = graph.constant(np.arange(node.shapes[told["slots"]][1])[:, None], np.int32)  # [K, 1] beside [B, 1, T]
    sizes = graph.once("Shape", graph.once("Add", slots, heads))
    places = [graph.once("Expand", x, sizes) for x in (rows, heads, slots)]
    new = graph.node("Transpose", told["new"], perm=(0, 2, 1, 3))
    _scatter(graph, told["slots"], places, new, node)


def _rows_and_slots(writer: Writer, node: Node) -> tuple[str, str]:
    """Returns the number of each row [B, 1], and the slots [B, T] of what is new in it."""
    told, graph = node.arguments, writer.graph
    rows, count, *_ = node.shapes[told["new"]]
    zero, one = graph.constant(0, np.int32), graph.constant(1, np.int32)
    upwards = lambda size: graph.once("Range", zero, size, one)
    rows, count = writer.size(told["new"], 0, rows), writer.size(told["new"], 1, count)
    column = lambda name: graph.once("Unsqueeze", name, graph.constant([1], np.int64))
    return column(upwards(rows)), graph.once("Add", column(told["offset"]), upwards(count))


def _scatter(graph: Graph, old: str, places: Sequence[str], new: str, node: Node) -> None:
    """Writes what is new at these places, one number for each of the first axes."""
    last = graph.constant([-1], np.int64)
    together = graph.once("Concat", *(graph.once("Unsqueeze", place, last) for place in places), axis=-1)
    graph.node("ScatterND", old, graph.once("Cast", together, to=INT64), new, out=node.out)


def _tables(writer: Writer, rotary: dict[str, Any]) -> list[str]:
    """Returns cosines and sines of all positions, [context, H / 2] each."""
    suffix = ":rotary" + "".join(f",{name}={value}" for name, value in sorted(rotary.items()))

    def make() -> dict[str, np.ndarray]:
        cos, sin = positions.rotary_angles(np.arange(writer.context)[None], **rotary)
        return {":cos": np.asarray(cos[0]), ":sin": np.asarray(sin[0])}

    return writer.graph.weight([], suffix, make)


def _one_to_one(kind: str, domain: str = "", **attributes: Any) -> Lowering:
    """An element-wise function of `x`."""
    write = lambda writer, node: writer.graph.node(kind, node.arguments["x"], out=node.out, domain=domain, **attributes)
    return Lowering(lambda told: _is_float(told["x"]), write)


_WRITTEN: dict[Callable[..., Any], Lowering] = {
    contract.contract: Lowering(_takes_contract, _write_contract),
    contract.add_bias: Lowering(lambda told: _is_float(told["x"]), _write_add_bias),
    contract.lookup: Lowering(_takes_lookup, _write_lookup),
    normalization.rms_norm: Lowering(_takes_norm, _write_rms_norm),
    normalization.layer_norm: Lowering(_takes_norm, _write_layer_norm),
    activations.gelu: _one_to_one("Gelu", approximate="tanh"),
    activations.gelu_exact: _one_to_one("Gelu"),
    activations.silu: _one_to_one("QuickGelu", MICROSOFT, alpha=1.0),
    activations.swiglu: Lowering(lambda told: _is_float(told["gate"], told["x"]), _write_swiglu),
    attention.dot_product_attention: Lowering(_takes_attention, _write_attention),
    tracing.cached_attention: Lowering(_takes_width, _write_cached),
    tracing.rotated_attention: Lowering(_takes_width, _write_rotated),
    caches.written: Lowering(_takes_written, _write_written),
    caches.written_by_head: Lowering(_takes_written, _write_written_by_head),
}
LOWERINGS = {function.__qualname__: lowering for function, lowering in _WRITTEN.items()}
# What `onnx_conversion` calls an operator; all of it can be written.
_CONVERTED = {
    "add": _write_add,
    "pad": _write_pad,
    "rem": _write_remainder,
    "reshape": _write_reshape,
    "select": _write_select,
}
LOWERINGS |= {name: Lowering(lambda told: True, write) for name, write in _CONVERTED.items()}
