"""Continuous batching: many prompts through a few rows; one that ends leaves its row to the next that waits.

Notable: a prompt's text depends on the seed and its own number alone, not on what shares the batch with it, and is what
`sample.generate` draws for the row of that number. Waiting prompts enter in groups whose sizes are powers of two, so
that few programs are compiled. What all prompts begin with is read once.
Left out: sorting the queue; paging (a row has room for the longest prompt and its continuation from the start).
Papers: continuous batching is Orca's (OSDI 2022); sharing prefixes, arXiv 2312.07104.

Dims: B rows of the batch, V vocab.
"""

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm.decoding import inputs, sample
from fastlm.decoding import rules as token_rules
from fastlm.decoding.sample import Sampling
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.ops.caches import Cache

WORTH_SHARING = 16  # tokens that all prompts begin with


@dataclasses.dataclass
class Finished:
    """What was written to a prompt.

    Attributes:
      number: of the prompt.
      tokens: up to the first end token, which is not among them.
      log_probabilities: that the model gives to each of them, in nats.
    """

    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)


def serve(
    model: Model,
    params: Any,
    prompts: inputs.Rows,
    *,
    max_tokens: int,
    rows: int = 8,
    how: Sampling = Sampling(),
    seed: int = 0,
    chunk: int = 16,
    start: int | None = None,
    ends: Sequence[int] = (),
    enough: Callable[[list[int]], bool] = lambda tokens: False,
    **rules: Any,
) -> Iterator[Finished]:
    """Returns an iterator over what is written to each prompt, as they finish.

    Args:
      prompts: of a decoder, or sources of an encoder-decoder.
      rows: prompts at a time.
      chunk: tokens between two looks at who has finished.
      start: the token that an encoder-decoder's decoder begins with.
      ends: tokens of which any ends a text.
      enough: asked of a text's tokens after each chunk: whether it counts as finished.
      rules: which tokens may come, as `rules.make` takes them.

    Raises:
      UserError: inputs or rules that `inputs.make` or `rules.make` refuses; at the call.
    """
    if rows < 1:
        raise UserError(f"rows: must be at least 1, got {rows}")
    whole = inputs.make(model.cfg, prompts, start, max_tokens)
    allowed = token_rules.make(model.cfg.vocab_size, max_tokens, **rules)
    longest = int(whole.lengths.max()) + -(-max_tokens // chunk) * chunk
    slots = inputs.bucket(max(whole.prompts.shape[1], longest))
    queue = _Queue(model, params, prompts, start, slots, max_tokens)
    return _serve(queue, min(rows, len(prompts)), max_tokens, how, seed, chunk, allowed, frozenset(ends), enough)


def _serve(queue, rows, max_tokens, how, seed, chunk, rules, ends, enough) -> Iterator[Finished]:
    keys = sample.row_keys(seed, range(len(queue.prompts)))
    running: dict[int, Finished] = {}
    numbers, written = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    cache, logits = queue.empty(rows)
    while queue.waiting or running:
        free = [row for row in range(rows) if row not in running]
        while free and queue.waiting:
            count = min(_power_below(len(free)), _power_below(len(queue.waiting)))
            taken, free = free[:count], free[count:]
            chosen = [queue.waiting.popleft() for _ in taken]
            cache, logits = _enter(cache, logits, np.array(taken, np.int32), *queue.read(chosen))
            numbers[taken], written[taken] = chosen, 0
            running |= {row: Finished(number) for row, number in zip(taken, chosen)}
        cache, logits, tokens, chances = sample.decode(
            queue.model, queue.params, chunk, how, rules, cache, logits, keys[numbers], written
        )
        tokens, chances = jax.device_get((tokens, chances))
        written += chunk
        for row, text in list(running.items()):
            new = tokens[row].tolist()[: max_tokens - len(text.tokens)]
            end = next((place for place, token in enumerate(new) if token in ends), len(new))
            text.tokens += new[:end]
            text.log_probabilities += chances[row].tolist()[:end]
            if end < len(new) or len(text.tokens) >= max_tokens or enough(text.tokens):
                yield running.pop(row)


class _Queue:
    """The prompts, which of them wait, and how they are read."""

    def __init__(self, model, params, prompts, start, slots, max_tokens) -> None:
        self.model, self.params, self.prompts = model, params, prompts
        self.waiting = deque(range(len(prompts)))
        self._start, self._slots, self._max_tokens = start, slots, max_tokens
        self._sources = 0 if start is None else inputs.bucket(max(map(len, prompts)))
        self._shared = shared_prefix(prompts) if start is None else 0
        self._prefix = self._read_prefix() if self._shared >= WORTH_SHARING and len(prompts) > 1 else None

    def empty(self, rows: int) -> tuple[Cache, Float[Array, "B V"]]:
        """Returns a batch with nothing in it."""
        cache = self.model.empty_cache(rows, self._slots, self._sources)
        return cache, jnp.zeros((rows, self.model.cfg.vocab_size), jnp.float32)

    def read(self, chosen: list[int]) -> tuple[Cache, Float[Array, "b V"]]:
        """Returns the caches behind these prompts, and the logits of what follows."""
        rows = [self.prompts[number] for number in chosen]
        if self._prefix is not None:
            batch = inputs.Inputs(*inputs.pad([row[self._shared :] for row in rows]))
            return _read_on(self.model, self.params, self._prefix, batch)
        batch = inputs.make(self.model.cfg, rows, self._start, self._max_tokens)
        if batch.sources is not None:
            wider = ((0, 0), (0, self._sources - batch.sources.shape[1]))
            batch = batch.replace(sources=np.pad(batch.sources, wider), segments=np.pad(batch.segments, wider))
        return sample.prefill(self.model, self.params, self._slots, batch)

    def _read_prefix(self) -> Cache:
        prefix = self.prompts[0][: self._shared]
        batch = inputs.make(self.model.cfg, [prefix], self._start, self._max_tokens)
        return sample.prefill(self.model, self.params, self._slots, batch)[0]


@functools.partial(jax.jit, static_argnums=0)
def _read_on(model: Model, params: Any, prefix: Cache, batch: inputs.Inputs) -> tuple[Cache, Float[Array, "b V"]]:
    """Reads rows that go on from what one row has read."""
    count = batch.prompts.shape[0]
    cache = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), prefix)
    return inputs.read(model, params, cache, batch)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _enter(
    cache: Cache, logits: Float[Array, "B V"], rows: Int[Array, "b"], new: Cache, new_logits: Float[Array, "b V"]
) -> tuple[Cache, Float[Array, "B V"]]:
    """Puts what was read into these rows of the batch."""
    put = lambda old, new: old.at[rows].set(new.astype(old.dtype))
    return jax.tree.map(put, cache, new), put(logits, new_logits)


def shared_prefix(prompts: inputs.Rows) -> int:
    """Returns how many tokens all prompts begin with, at least one left over in each."""
    rows = [list(map(int, row)) for row in prompts]
    first, last = min(rows), max(rows)  # in the order of a dictionary these two differ earliest
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
    return min(sum(1 for _ in same), min(map(len, rows)) - 1)


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
