"""Sampling and greedy search with a cache: prefill once, then a loop that stays on the device.

Notable: prompts of unequal length share one batch, padded on the right (see `inputs`); each row
continues at its own position. An encoder-decoder reads sources instead, and begins with a start token. Every
row has its own random key, split from (seed, row), so a prompt's continuation does not depend on
what else is in the batch. Streaming is a loop over short device-side chunks.
Filters: top-k; top-p (arXiv 1904.09751); min-p (arXiv 2407.01082).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.data.tokenizers import StreamDecoder, Tokenizer
from fastlm.data.tokenizers.base import check_text
from fastlm.decoding import inputs
from fastlm.decoding import rules as token_rules
from fastlm.decoding.rules import NEGATIVE, Rules
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.ops.caches import Cache
from fastlm.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: keep the k likeliest; 0 keeps all.
      top_p: keep the smallest set with this much probability; 1 keeps all.
      min_p: keep tokens at least this share as likely as the likeliest; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not np.isfinite(self.temperature):
            raise UserError(f"temperature must be a number >= 0, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError(
                "top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1 are needed, "
                f"got {self.top_k}, {self.top_p}, {self.min_p}"
            )


def filtered(logits: Float[Array, "... V"], how: Sampling) -> Float[Array, "... V"]:
    """Returns logits at the temperature asked for, with the tokens that `how` drops at -1e30."""
    logits = logits / how.temperature
    if how.top_k and how.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, how.top_k)[0][..., -1:]
        logits = jnp.where(logits < smallest, NEGATIVE, logits)
    if how.min_p:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(how.min_p)
        logits = jnp.where(logits < floor, NEGATIVE, logits)
    if how.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        kept = jnp.sum(before < how.top_p, axis=-1, keepdims=True)
        logits = jnp.where(logits < jnp.take_along_axis(ordered, kept - 1, axis=-1), NEGATIVE, logits)
    return logits


def draw(logits: Float[Array, "B V"], keys: Array, how: Sampling) -> Int[Array, "B"]:
    """Draws one token per row, each with its own key."""
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, how)).astype(jnp.int32)


prefill = jax.jit(inputs.prefill, static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=(0, 2, 3), donate_argnums=(5,))
def decode(
    model: Model,
    params: Any,
    steps: int,
    how: Sampling,
    rules: Rules,
    cache: Cache,
    logits: Float[Array, "B V"],
    keys: Array,
    written: Int[Array, "B"],
) -> tuple[Cache, Float[Array, "B V"], Int[Array, "B S"], Float[Array, "B S"]]:
    """Draws S = `steps` tokens for each row behind those it has `written`.

    Returns:
      (cache, logits behind the last, tokens, the log-probability the model itself gives to each: whatever the
      temperature, filters and rules).
    """

    def body(state, index):
        cache, logits = state
        position_keys = jax.vmap(jax.random.fold_in)(keys, cache.length)
        token = draw(jax.vmap(rules.allow)(logits, written + index), position_keys, how)
        chance = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        hidden, aux = model.features(params, token[:, None], cache=cache)
        return (aux["cache"], model.head(params, hidden[:, 0])), (token, chance)

    (cache, logits), (tokens, chances) = jax.lax.scan(body, (cache, logits), jnp.arange(steps))
    whole = lambda x: constrain(x.T, (None, None))  # on every process, which all read it
    return cache, logits, whole(tokens), whole(chances)


def generate(
    model: Model,
    params: Any,
    rows: inputs.Rows,
    *,
    max_tokens: int,
    how: Sampling = Sampling(),
    seed: int = 0,
    first: int = 0,
    chunk: int = 16,
    start: int | None = None,
    **rules: Any,
) -> Iterator[np.ndarray]:
    """Returns an iterator of arrays [B, <= chunk] of new tokens, until each row has `max_tokens` of them.

    Args:
      rows: prompts of a decoder, or sources of an encoder-decoder.
      first: number of the first row, of those of which these are a part: what is drawn depends on it.
      start: the token that an encoder-decoder's decoder begins with.
      rules: which tokens may come, as `rules.make` takes them; rows do not stop at an end token (see `until_end`).

    Raises:
      UserError: inputs or rules that `inputs.make` or `rules.make` refuses; at the call.
    """
    batch = inputs.make(model.cfg, rows, start, max_tokens)
    allowed = token_rules.make(model.cfg.vocab_size, max_tokens, **rules)
    keys = row_keys(seed, range(first, first + len(rows)))
    return run(model, params, batch, keys, max_tokens, how, allowed, chunk)


def row_keys(seed: int, rows: Sequence[int]) -> Array:
    """Returns the random key of each row, by its number alone."""
    root = jax.random.key(seed)
    return jax.vmap(lambda row: jax.random.fold_in(root, row))(jnp.asarray(rows, jnp.uint32))


@functools.singledispatch
def run(
    model: Model,
    params: Any,
    batch: inputs.Inputs,
    keys: Array,
    max_tokens: int,
    how: Sampling,
    rules: Rules,
    chunk: int,
) -> Iterator[np.ndarray]:
    """Yields what `generate` returns. What runs models otherwise registers how it does this."""
    longest = int(batch.lengths.max())
    slots = inputs.bucket(max(batch.prompts.shape[1], longest + -(-max_tokens // chunk) * chunk))
    cache, logits = prefill(model, params, slots, batch)
    for begin in range(0, max_tokens, chunk):
        written = np.full(len(batch.lengths), begin, np.int32)
        cache, logits, tokens, _ = decode(model, params, chunk, how, rules, cache, logits, keys, written)
        yield np.asarray(tokens)[:, : max_tokens - begin]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns a prompt as documents begin in training: with the start token, where there is one.

    Raises:
      UserError: the prompt is not text (bytes of a command line that are no UTF-8).
    """
    check_text(prompt, "the prompt")
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return start + [int(i) for i in tokenizer.encode(prompt)]


def text_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Returns the text of a continuation, to stand after its prompt; the same as streaming gives.

    `Tokenizer.decode` is for whole texts: some drop the space that opens the first word.
    """
    decoder = StreamDecoder(tokenizer)
    return "".join(map(decoder.push, tokens)) + decoder.finish()


def stream(
    tokenizer: Tokenizer,
    chunks: Iterable[Sequence[np.ndarray]],
    ends: Collection[int] | None = None,
    whole: bool = False,
    stops: Collection[str] = (),
) -> Iterator[str]:
    """Yields the text of the first row chunk by chunk, in whole characters, up to the first of `ends` or `stops`.

    Args:
      ends: tokens that end it; None for the tokenizer's.
      whole: whether it stands for itself, and does not go on from a prompt; see `StreamDecoder`.
      stops: texts that end it; what may be the beginning of one is held back until it is known.
    """
    decoder, ends = StreamDecoder(tokenizer, whole), {tokenizer.eos} if ends is None else ends
    text, held = "", max(map(len, stops), default=1) - 1
    for chunk in chunks:
        tokens = chunk[0].tolist()
        before = list(itertools.takewhile(lambda token: token not in ends, tokens))
        text += "".join(map(decoder.push, before))
        if (end := first_stop(text, stops)) is not None:
            yield text[:end]
            return
        if len(before) < len(tokens):
            break
        shown = max(len(text) - held, 0)
        yield text[:shown]
        text = text[shown:]
    text += decoder.finish()
    yield text[: first_stop(text, stops)]


def first_stop(text: str, stops: Collection[str]) -> int | None:
    """Returns where the first of `stops` begins in a text; None if none is there."""
    return min((text.index(stop) for stop in stops if stop in text), default=None)


def until_end(
    chunks: Iterable[Sequence[np.ndarray]], *ends: int, enough: Callable[[list[int]], bool] = lambda tokens: False
) -> list[list[int]]:
    """Collects rows of tokens, each up to (not including) the first of `ends`; stops early when all ended.

    Args:
      enough: asked of a row after each chunk: whether it counts as ended.
    """
    rows: list[list[int]] = []
    ended: list[bool] = []
    for chunk in chunks:
        if not rows:
            rows, ended = [[] for _ in chunk], [False] * len(chunk)
        for i, tokens in enumerate(chunk):
            for token in tokens.tolist():
                ended[i] = ended[i] or token in ends
                if not ended[i]:
                    rows[i].append(token)
            ended[i] = ended[i] or enough(rows[i])
        if all(ended):
            break
    return rows
