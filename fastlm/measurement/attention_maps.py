"""Attention weights of one text, and per head how many tokens it looks at and how far away they are.

Per head, the mean over the queries of the text:

  entropy       of the weights, in nats; exp(entropy) is the effective number of tokens looked at
  distance      from a query to what it looks at, in tokens, weighted; none in cross-attention, whose two
                texts have no common order
  first_token   share of the weight on the first token, where many heads rest (attention sinks, arXiv 2309.17453)

Notable: kinds without a softmax have weights that may be negative or sum to anything; numbers are then of absolute
weights, each query's divided by their sum. A query that looks at nothing counts for nothing.
Entropy and distance of heads: arXiv 1906.04341, 2010.11929.
Left out: attention through several layers (rollout), gradients, averages over many texts.

Dims: N heads, T queries, S keys.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.models import attention as attention_kinds
from fastlm.ops.softmax import calibrated
from fastlm.parallel.rules import constrain

MOST_BYTES = 2**30  # of the weights of all layers, which are in memory together
LOST = 1e-3  # share of a query's weight that a calibrated threshold may drop
TOLERANCE = 0.02  # of a sum of weights that counts as 1: bfloat16 rounds


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMap:
    """The weights of one layer's self- or cross-attention.

    Attributes:
      stack: "encoder", "decoder" or "cross".
      layer: number of the layer, as in the parameters' paths.
      kind: as the config names it, "local(window=64)".
      causal: whether keys behind the query are hidden.
      queries, keys: which text they are of: "tokens" or "source".
      weights: [N, T, S], of each value in each output.
    """

    stack: str
    layer: int
    kind: str
    causal: bool
    queries: str
    keys: str
    weights: Float[np.ndarray, "N T S"]

    @property
    def name(self) -> str:
        """For titles."""
        stack = "decoder" if self.stack == "cross" else self.stack
        return f"{stack} layer {self.layer}" + (", cross-attention" if self.stack == "cross" else "")

    @functools.cached_property
    def signed(self) -> bool:
        """Whether any weight is negative."""
        return bool(np.min(self.weights) < 0)

    @functools.cached_property
    def sums_to_one(self) -> bool:
        """Whether the weights of each query that looks at anything are shares."""
        sums = np.sum(self.weights, axis=-1)
        return not self.signed and bool(np.all((np.abs(sums - 1) < TOLERANCE) | (sums == 0)))

    @functools.cached_property
    def entropy(self) -> Float[np.ndarray, "N"]:
        """In nats."""
        return entropy(self.weights)

    @functools.cached_property
    def distance(self) -> Float[np.ndarray, "N"] | None:
        """In tokens; None between different texts."""
        return distance(self.weights) if self.queries == self.keys else None

    @functools.cached_property
    def first_token(self) -> Float[np.ndarray, "N"]:
        """From 0 to 1."""
        return first_token(self.weights)

    @functools.cached_property
    def threshold_margin(self) -> float | None:
        """The margin at which the softmax `threshold` drops at most `LOST` of any query's weight; None without one."""
        looks = self.weights[np.sum(self.weights, axis=-1) > 0]
        if not attention_kinds.kind(self.kind).softmax or not self.sums_to_one or not len(looks):
            return None
        with np.errstate(divide="ignore"):
            return calibrated(np.log(looks), LOST).margin

    @property
    def most_entropy(self) -> float:
        """The entropy of looking at everything visible alike, in nats."""
        queries, keys = self.weights.shape[1:]
        visible = np.minimum(np.arange(queries) + 1, keys) if self.causal else np.full(queries, keys)
        return float(np.mean(np.log(visible)))


@dataclasses.dataclass(frozen=True, eq=False)
class Looked:
    """A text that a model read, and its maps.

    Attributes:
      title: which model.
      tokens: name -> the tokens of each text as a person reads them; names as in `AttentionMap.queries`.
      maps: of every layer.
      notice: what of the text was left away, "" for nothing.
    """

    title: str
    tokens: dict[str, list[str]]
    maps: list[AttentionMap]
    notice: str = ""


def entropy(weights: Float[np.ndarray, "N T S"]) -> Float[np.ndarray, "N"]:
    """Returns the mean entropy of the heads' queries in nats, NaN of a head that looks at nothing."""
    parts, looks = _shares(weights)
    return _mean(-np.sum(parts * np.log(np.where(parts > 0, parts, 1)), axis=-1), looks)


def distance(weights: Float[np.ndarray, "N T S"]) -> Float[np.ndarray, "N"]:
    """Returns how many tokens away, on either side, the heads look on average."""
    parts, looks = _shares(weights)
    queries, keys = np.indices(weights.shape[1:])
    return _mean(np.sum(parts * np.abs(queries - keys), axis=-1), looks)


def first_token(weights: Float[np.ndarray, "N T S"]) -> Float[np.ndarray, "N"]:
    """Returns the mean share of the first key."""
    parts, looks = _shares(weights)
    return _mean(parts[..., 0], looks)


def capture(model: Model, params: Any, inputs: Mapping[str, np.ndarray]) -> list[AttentionMap]:
    """Runs a model over one example and returns its maps: the encoder's, the decoder's, then cross-attention's.

    Args:
      inputs: "tokens" [T], and "token_types" [T] or an encoder-decoder's "source" [S] where it reads them.

    Raises:
      UserError: nothing to read, more than the model's context or than fits in memory, or an attention kind
        that shows no weights.
    """
    cfg = model.cfg
    _check(model, {name: len(ids) for name, ids in inputs.items() if name != "token_types"})
    captured = _run(model, params, {name: np.asarray(ids, np.int32)[None] for name, ids in inputs.items()})
    found = []
    for stack, layers in _layers(model).items():
        queries, keys = _texts(cfg.family, stack)
        for i, weights in zip(layers, _complete(model, stack, captured.get(stack, []))):
            layer = cfg.layer(i)
            kind = layer.cross_attention if stack == "cross" else layer.attention
            weights = np.asarray(jax.device_get(weights), np.float32)[0]
            found.append(AttentionMap(stack, i, kind, stack == "decoder", queries, keys, weights))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _run(model: Model, params: Any, inputs: dict[str, Array]) -> dict[str, list[Array]]:
    """Returns the captured weights [1, N, T, S] by stack, whole on every process."""
    found, wanted = {}, ("attention",)
    options = {"token_types": inputs["token_types"]} if "token_types" in inputs else {}
    if "source" in inputs:
        options["memory"], aux = model.encode(params, inputs["source"], capture=wanted)
        found["encoder"] = aux.get("attention", [])
    _, aux = model.features(params, inputs["tokens"], capture=wanted, **options)
    found["encoder" if model.cfg.family == "encoder" else "decoder"] = aux.get("attention", [])
    found["cross"] = aux.get("cross_attention", [])
    return {stack: [constrain(w, (None,) * 4) for w in weights] for stack, weights in found.items()}


def _layers(model: Model) -> dict[str, range]:
    """Returns the numbers of the layers whose weights each stack has."""
    cfg = model.cfg
    if cfg.family == "encoder_decoder":
        return {"encoder": cfg.encoder_stack, "decoder": cfg.stack, "cross": cfg.stack}
    return {cfg.family: cfg.stack}


def _texts(family: str, stack: str) -> tuple[str, str]:
    """Returns the names of the inputs that queries and keys are of."""
    if family != "encoder_decoder" or stack == "decoder":
        return "tokens", "tokens"
    return ("source", "source") if stack == "encoder" else ("tokens", "source")


def _complete(model: Model, stack: str, weights: list[Array]) -> list[Array]:
    layers = [model.cfg.layer(i) for i in _layers(model)[stack]]
    if len(weights) != len(layers):
        kinds = dict.fromkeys(layer.cross_attention if stack == "cross" else layer.attention for layer in layers)
        raise UserError(
            f"{len(layers) - len(weights)} of {len(layers)} layers show no attention weights; one of these kinds has "
            f"none to show: {', '.join(kinds)}"
        )
    return weights


def _check(model: Model, lengths: dict[str, int]) -> None:
    if not all(lengths.values()):
        raise UserError("the text has no tokens; give at least one word")
    longest, context = max(lengths.values()), model.cfg.max_length
    if longest > context:
        raise UserError(f"the text has {longest} tokens, the model's context {context} (model.max_length); cut it")
    needed = 0
    for stack, layers in _layers(model).items():
        queries, keys = (lengths[name] for name in _texts(model.cfg.family, stack))
        needed += sum(model.cfg.layer(i).heads for i in layers) * queries * keys * 4
    if needed > MOST_BYTES:
        raise UserError(
            f"the weights of all layers for {longest} tokens take {needed / 2**30:.1f} GiB, more than the "
            f"{MOST_BYTES / 2**30:.0f} that maps may; look at fewer tokens"
        )


def _shares(weights: Float[np.ndarray, "N T S"]) -> tuple[Float[np.ndarray, "N T S"], Bool[np.ndarray, "N T"]]:
    """Returns absolute weights divided by their sums, and which queries look at anything."""
    sizes = np.abs(weights.astype(np.float64))
    sums = np.sum(sizes, axis=-1, keepdims=True)
    return sizes / np.where(sums == 0, 1, sums), sums[..., 0] != 0


def _mean(values: Float[np.ndarray, "N T"], counted: Bool[np.ndarray, "N T"]) -> Float[np.ndarray, "N"]:
    counts = np.sum(counted, axis=-1)
    totals = np.sum(np.where(counted, values, 0), axis=-1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)
