"""What a student may take from inside a teacher: hidden states, embeddings, attention maps, relations.

Notable: a feature is a distance for each row, the mean over its tokens, and counts as often as the row has
predictions: so accumulating microbatches equals the large batch. Layers are paired by number, 1 for the first
layer's result, 0 for what enters it; "evenly" gives student layer i of L the teacher's layer round(i M / L) of M.
Where widths differ, a learned projection of the student's hidden states stands between; it is trained and not exported.
Papers: hidden states and scores of attention before the softmax, TinyBERT (arXiv 1909.10351), DistilBERT's cosine
(1910.01108); relations of queries, keys and values, MiniLM (2002.10957) and, with any number of relation heads,
MiniLMv2 (2012.15828).
Left out: losses between distributions of neurons (NST, as TextBrewer has them).

Dims: B batch, T time, S keys, D embed, N heads, K kv heads, H head dim, R relation heads, E width of a relation head.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastlm.errors import UserError
from fastlm.models import ModelConfig
from fastlm.tasks.task import Read

Pairs = tuple[tuple[int, int], ...]
STACKS = ("", "encoder")
DISTANCES = ("mse", "cosine")


@dataclasses.dataclass(frozen=True)
class Feature(ABC):
    """A term of the loss.

    Attributes:
      layers: "evenly", "last", or pairs (student's layer, teacher's layer).
      stack: "" for the only stack or the decoder, "encoder" for an encoder-decoder's encoder.
    """

    layers: str | tuple = "evenly"
    stack: str = ""

    captures = ()  # of `models.transformer.CAPTURES`
    least = 1  # lowest layer that there is

    def __post_init__(self) -> None:
        if self.stack not in STACKS:
            raise UserError(f"stack: '{self.stack}' is no stack; 'encoder', or '' for the only one or the decoder")

    def pairs(self, student: ModelConfig, teacher: ModelConfig) -> Pairs:
        """Returns pairs of layers.

        Raises:
          UserError: a layer that one of the two does not have.
        """
        if self.stack and not (student.encoder_layers and teacher.encoder_layers):
            raise UserError("stack: 'encoder' is of encoder-decoders; leave it empty")
        few, many = (cfg.encoder_layers if self.stack else cfg.layers for cfg in (student, teacher))
        if self.layers == "last":
            return ((few, many),)
        if self.layers == "evenly":
            return tuple((i, round(i * many / few)) for i in range(self.least, few + 1))
        for pair in self.layers if isinstance(self.layers, tuple) else (None,):
            if not isinstance(pair, tuple) or [type(place) for place in pair] != [int, int]:
                raise UserError(f"layers: 'evenly', 'last', or pairs as ((1, 2), (2, 4)), not {self.layers!r}")
            for place, most, whose in zip(pair, (few, many), ("student", "teacher")):
                if not self.least <= place <= most:
                    raise UserError(
                        f"layers: {pair} asks for layer {place} of the {whose}, which has {self.least} to {most}"
                    )
        return self.layers

    def check(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Raises a `UserError` where the two cannot be compared."""
        self.pairs(student, teacher)

    def init(self, rng: Array, student: ModelConfig, teacher: ModelConfig) -> dict[str, Array]:
        """Returns what is trained beside the model for this term, by name."""
        del rng, student, teacher
        return {}

    @abstractmethod
    def __call__(
        self, params: dict[str, Array], student: Read, teacher: Read, pairs: Pairs, causal: bool
    ) -> Float[Array, "B"]:
        """Returns the distance of each row; `causal`: whether the stack looks at earlier tokens alone."""

    def taken(self, name: str, read: Read) -> list[Any]:
        """Returns what was captured of this term's stack."""
        return read.captured[f"{self.stack}_{name}" if self.stack else name]


@dataclasses.dataclass(frozen=True)
class Hidden(Feature):
    """The residual stream behind layers.

    Attributes:
      distance: "mse" (mean squared error) or "cosine" (1 - cosine: half the error of states that are scaled to a root
        mean square of 1). Where norms stand before layers the stream grows, and "mse" with its square.
      project: a projection even where widths are equal.
    """

    distance: str = "mse"
    project: bool = False

    captures = ("hidden",)
    least = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance not in DISTANCES:
            raise UserError(f"distance: '{self.distance}' is unknown; one of: {', '.join(DISTANCES)}")

    def pairs(self, student: ModelConfig, teacher: ModelConfig) -> Pairs:
        """See `Feature`; "evenly" leaves out what enters the first layer (see `Embeddings`)."""
        pairs = super().pairs(student, teacher)
        return tuple(pair for pair in pairs if pair[0]) if self.layers == "evenly" else pairs

    def init(self, rng: Array, student: ModelConfig, teacher: ModelConfig) -> dict[str, Array]:
        """Returns a projection [student's width, teacher's] for each pair where one is needed."""
        if student.width == teacher.width and not self.project:
            return {}
        pairs, shape = self.pairs(student, teacher), (student.width, teacher.width)
        keys = jax.random.split(rng, len(pairs))
        draw = lambda key: jax.random.normal(key, shape) * student.width**-0.5
        return {f"{a}_{b}": draw(key) for (a, b), key in zip(pairs, keys)}

    def __call__(
        self, params: dict[str, Array], student: Read, teacher: Read, pairs: Pairs, causal: bool
    ) -> Float[Array, "B"]:
        """Returns the mean over pairs and tokens."""
        del causal
        own, theirs = self.taken("hidden", student), self.taken("hidden", teacher)
        distances = []
        for a, b in pairs:
            x, y = own[a].astype(jnp.float32), theirs[b].astype(jnp.float32)
            x = x @ params[f"{a}_{b}"] if params else x
            if self.distance == "mse":
                distances.append(jnp.mean(jnp.square(x - y), axis=-1))
            else:
                distances.append(1 - jnp.sum(_unit(x) * _unit(y), axis=-1))
        return over_tokens(sum(distances) / len(distances), student.documents[self.stack])


@dataclasses.dataclass(frozen=True)
class Embeddings(Hidden):
    """What enters the first layer."""

    layers: str | tuple = ((0, 0),)


@dataclasses.dataclass(frozen=True)
class AttentionMaps(Feature):
    """The weights of heads: KL(teacher | student) of each query, the mean over heads; as many heads on both sides."""

    captures = ("attention",)

    def check(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Refuses different numbers of heads."""
        for a, b in self.pairs(student, teacher):
            heads = [_layer(cfg, place, self.stack).heads for cfg, place in ((student, a), (teacher, b))]
            if heads[0] != heads[1]:
                raise UserError(
                    f"attention of heads: layer {a} of the student has {heads[0]} heads, layer {b} of the teacher "
                    f"{heads[1]}; use 'relations', which cut queries, keys and values anew"
                )

    def __call__(
        self, params: dict[str, Array], student: Read, teacher: Read, pairs: Pairs, causal: bool
    ) -> Float[Array, "B"]:
        """Returns the mean over pairs, heads and queries."""
        del params, causal
        own, theirs = self.taken("attention", student), self.taken("attention", teacher)
        distances = [jnp.mean(_kl_of_weights(theirs[b - 1], own[a - 1]), axis=1) for a, b in pairs]
        return over_tokens(sum(distances) / len(distances), student.documents[self.stack])


@dataclasses.dataclass(frozen=True)
class AttentionScores(AttentionMaps):
    """What heads make of queries and keys before the softmax: squared error of q . k / sqrt(H) where a key is visible.

    What models do with it after that (another scale, a cap, what positions add) is not compared.
    """

    captures = ("qkv",)

    def __call__(
        self, params: dict[str, Array], student: Read, teacher: Read, pairs: Pairs, causal: bool
    ) -> Float[Array, "B"]:
        """Returns the mean over pairs, heads, queries and their visible keys."""
        del params
        own, theirs = self.taken("qkv", student), self.taken("qkv", teacher)
        seen = visible(student.documents[self.stack], causal).astype(jnp.float32)
        distances = []
        for a, b in pairs:
            errors = jnp.mean(jnp.square(scores(*own[a - 1][:2]) - scores(*theirs[b - 1][:2])), axis=1)
            distances.append(jnp.sum(errors * seen, axis=-1) / jnp.sum(seen, axis=-1))
        return over_tokens(sum(distances) / len(distances), student.documents[self.stack])


@dataclasses.dataclass(frozen=True)
class Relations(Feature):
    """How tokens relate by their queries, keys or values: KL(teacher | student) of softmax(A A^T / sqrt(E)).

    Attributes:
      of: which of "q", "k", "v".
      heads: R, into which the joined heads are cut anew; 0 for the teacher's number of heads.
    """

    layers: str | tuple = "last"
    of: str = "qkv"
    heads: int = 0

    captures = ("qkv",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.of or set(self.of) - set("qkv") or self.heads < 0:
            raise UserError(f"relations: of some of 'qkv', and heads of at least 0, got {self.of!r} and {self.heads}")

    def check(self, student: ModelConfig, teacher: ModelConfig) -> None:
        """Refuses a number of relation heads that does not divide what is cut."""
        for a, b in self.pairs(student, teacher):
            layers = {"student": _layer(student, a, self.stack), "teacher": _layer(teacher, b, self.stack)}
            count = self.heads or layers["teacher"].heads
            for whose, layer in layers.items():
                for letter in self.of:
                    size = (layer.heads if letter == "q" else layer.kv_heads) * layer.head_dim
                    if size % count:
                        raise UserError(
                            f"relations: {count} heads do not divide the {size} numbers of the {whose}'s '{letter}'; "
                            "give heads=... that does, in both"
                        )

    def __call__(
        self, params: dict[str, Array], student: Read, teacher: Read, pairs: Pairs, causal: bool
    ) -> Float[Array, "B"]:
        """Returns the mean over pairs, kinds of relation, heads and queries."""
        del params
        own, theirs = self.taken("qkv", student), self.taken("qkv", teacher)
        seen = visible(student.documents[self.stack], causal)
        distances = []
        for a, b in pairs:
            count = self.heads or theirs[b - 1][0].shape[2]
            for letter in self.of:
                x, y = (relations(qkv["qkv".index(letter)], count, seen) for qkv in (own[a - 1], theirs[b - 1]))
                distances.append(jnp.mean(jnp.sum(jnp.exp(y) * jnp.where(seen[:, None], y - x, 0.0), axis=-1), axis=1))
        return over_tokens(sum(distances) / len(distances), student.documents[self.stack])


FEATURES: dict[str, type[Feature]] = {
    "hidden": Hidden,
    "embeddings": Embeddings,
    "attention": AttentionMaps,
    "attention_scores": AttentionScores,
    "relations": Relations,
}


def over_tokens(values: Float[Array, "B T"], documents: Int[Array, "B T"]) -> Float[Array, "B"]:
    """Returns the mean of each row over its tokens; 0 for a row without one."""
    mask = (documents > 0).astype(jnp.float32)
    return jnp.sum(values * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)


def visible(documents: Int[Array, "B T"], causal: bool) -> Bool[Array, "B T S"]:
    """Returns which tokens relate: those of one document, earlier ones alone if `causal`; and each to itself."""
    places = jnp.arange(documents.shape[1])
    same = (documents[:, :, None] == documents[:, None, :]) & (documents[:, :, None] > 0)
    return (same & ((places[:, None] >= places) | (not causal))) | (places[:, None] == places)


def relations(x: Float[Array, "B T N H"], count: int, seen: Array) -> Float[Array, "B R T S"]:
    """Returns log-softmax of how tokens relate, with the heads joined and cut into `count`."""
    rows, length = x.shape[:2]
    x = jnp.swapaxes(x.astype(jnp.float32).reshape(rows, length, count, -1), 1, 2)
    scores = x @ jnp.swapaxes(x, 2, 3) / math.sqrt(x.shape[-1])
    return jax.nn.log_softmax(jnp.where(seen[:, None], scores, -1e9))


def scores(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Float[Array, "B N T S"]:
    """Returns q . k / sqrt(H) of each head; head n has key n // (N / K)."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2).astype(jnp.float32)
    return jnp.einsum("BTNH,BSNH->BNTS", q.astype(jnp.float32), k) / math.sqrt(q.shape[-1])


def _kl_of_weights(teacher: Float[Array, "B N T S"], student: Float[Array, "B N T S"]) -> Float[Array, "B N T"]:
    least = 1e-12  # weights of hidden keys are 0 on both sides
    p, q = teacher.astype(jnp.float32), student.astype(jnp.float32)
    return jnp.sum(p * (jnp.log(jnp.maximum(p, least)) - jnp.log(jnp.maximum(q, least))), axis=-1)


def _unit(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))


def _layer(cfg: ModelConfig, place: int, stack: str) -> Any:
    return cfg.layer((cfg.encoder_stack if stack else cfg.stack)[place - 1])
