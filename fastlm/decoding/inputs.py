"""What decoding starts from: prompts of a decoder, or sources of an encoder-decoder and its start token.

Notable: rows of unequal length are padded on the right, and lengths rounded up to powers of two, so that
few shapes are ever compiled. Where a source is padded its segment is 0, which no attention looks at.

Dims: B batch, P prompt time, S source time, V vocab.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.models import attention as attention_kinds
from fastlm.ops.caches import Cache, Memory

Rows = Sequence[Sequence[int] | np.ndarray]


@flax.struct.dataclass
class Inputs:
    """A padded batch.

    Attributes:
      prompts, lengths: what the decoder is given, and how much of each row is real.
      sources, segments: what the encoder reads, segments 0 where it is padding; None for a decoder alone.
    """

    prompts: Int[Array, "B P"]
    lengths: Int[Array, "B"]
    sources: Int[Array, "B S"] | None = None
    segments: Int[Array, "B S"] | None = None


def bucket(length: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (length - 1).bit_length())


def pad(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows padded with 0 to a common bucket [B, bucket], and their lengths [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), bucket(int(lengths.max()))), np.int32)
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded, lengths


def make(cfg: ModelConfig, rows: Rows, start: int | None, max_tokens: int) -> Inputs:
    """Returns prompts of a decoder, or sources of an encoder-decoder whose decoder begins with `start`.

    Raises:
      UserError: no or empty rows, rows or continuations longer than the model's context, tokens outside
        the vocabulary, a start token where none is needed or none where one is, or a model that writes nothing.
    """
    _check_model(cfg, start)
    _check_tokens(rows, cfg.vocab_size)
    if start is None:
        check_lengths([len(row) for row in rows], max_tokens, cfg.max_length)
        return Inputs(*pad(rows))
    _check_sources(rows, cfg.max_length)
    check_lengths([1], max_tokens, cfg.max_length)
    sources, lengths = pad(rows)
    real = np.arange(sources.shape[1]) < lengths[:, None]
    prompts = np.full((len(rows), 1), start, np.int32)
    return Inputs(prompts, np.ones(len(rows), np.int32), sources, real.astype(np.int32))


def prefill(model: Model, params: Any, slots: int, inputs: Inputs) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads the inputs; returns the cache and the logits after each prompt's last token."""
    cache, memory = begin(model, params, slots, inputs)
    return read(model, params, cache, inputs, memory, empty=True)


def begin(model: Model, params: Any, slots: int, inputs: Inputs) -> tuple[Cache, Memory | None]:
    """Returns an empty cache for the prompts, and what an encoder-decoder has read of the sources."""
    memory, source_slots = None, 0
    if inputs.sources is not None:
        memory, _ = model.encode(params, inputs.sources, segment_ids=inputs.segments)
        source_slots = inputs.sources.shape[1]
    return model.empty_cache(inputs.prompts.shape[0], slots, source_slots), memory


def read(
    model: Model, params: Any, cache: Cache, inputs: Inputs, memory: Memory | None = None, *, empty: bool = False
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads prompts behind what the cache holds, or into one known to be `empty`, which is faster.

    Returns the cache and the logits after each prompt's last token.
    """
    hidden, aux = model.features(
        params, inputs.prompts, memory=memory, cache=cache, lengths=inputs.lengths, empty=empty
    )
    last = jnp.take_along_axis(hidden, (inputs.lengths - 1)[:, None, None], axis=1)[:, 0]
    return aux["cache"], model.head(params, last)


def check_lengths(lengths: Sequence[int] | np.ndarray, max_tokens: int, context: int) -> None:
    """Checks that prompts of `lengths` tokens can be continued by `max_tokens`.

    Raises:
      UserError: an empty prompt, nothing to add, or more than the model's context.
    """
    if not len(lengths) or min(lengths) < 1:
        raise UserError("a prompt has no tokens; give at least one character")
    if max_tokens < 1:
        raise UserError(f"max_tokens: must be at least 1, got {max_tokens}")
    longest = int(max(lengths))
    if longest + max_tokens > context:
        raise UserError(
            f"the longest prompt has {longest} tokens, and {max_tokens} more make {longest + max_tokens}, "
            f"but the model's context is {context} tokens (model.max_length); shorten the prompt or add fewer"
        )


def _check_model(cfg: ModelConfig, start: int | None) -> None:
    if cfg.family == "encoder" or cfg.head != "language_model":
        raise UserError(f"a model of family '{cfg.family}' with head '{cfg.head}' writes no text; use one that does")
    if cfg.family == "encoder_decoder" and start is None:
        raise UserError("start: an encoder-decoder needs the token that its decoder begins with; give one")
    if cfg.family == "decoder" and start is not None:
        raise UserError("start: a decoder continues its prompts; put the start token into them instead")
    if start is not None:
        check_token("start", start, cfg.vocab_size)
    check_kinds(cfg)


def check_kinds(cfg: ModelConfig) -> None:
    """Raises a `UserError` unless the attention of all layers that write runs step by step."""
    for layer in map(cfg.layer, cfg.stack):
        attention_kinds.require(layer.attention, "decode")
        if layer.cross:
            attention_kinds.require(layer.cross_attention, "decode", key="cross_attention")


def _check_tokens(rows: Rows, vocab_size: int) -> None:
    for number, row in enumerate(rows):
        if len(row) and not 0 <= min(row) <= max(row) < vocab_size:
            raise UserError(
                f"input {number} has token {min(row) if min(row) < 0 else max(row)}, but the model's vocabulary has "
                f"{vocab_size}; use the model's own tokenizer"
            )


def check_token(name: str, token: int, vocab_size: int) -> None:
    """Raises a `UserError` unless the model's vocabulary has the token."""
    if not 0 <= token < vocab_size:
        raise UserError(f"{name}: token {token} is outside the model's vocabulary of {vocab_size}; give another")


def _check_sources(rows: Rows, context: int) -> None:
    if not len(rows) or not min(map(len, rows)):
        raise UserError("a source has no tokens; give at least one")
    longest = max(map(len, rows))
    if longest > context:
        raise UserError(
            f"the longest source has {longest} tokens, but the model's context is {context} (model.max_length); cut it"
        )
