"""What runs a model, as the ruler sees it: reading rows, and writing tokens behind them, timed alone.

Notable: a runtime gets numbers only (how many rows, how long) and draws the tokens itself, the same for every model
with that vocabulary, so that two models, or one model in two runtimes, do the same work.

Dims: B batch, T time.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np

from fastlm.decoding import inputs, sample
from fastlm.models import Model, ModelConfig

PIECE = 8  # tokens written between two looks at the clock


class Runtime(Protocol):
    """See the header."""

    def writes(self) -> bool:
        """Whether it writes tokens at all: an encoder does not."""

    def read(self, rows: int, length: int) -> float:
        """Reads B rows of T tokens up to its answer, classes or logits of the next token; returns seconds."""

    def write(self, rows: int, length: int, count: int) -> list[float]:
        """Reads B rows of T tokens and writes `count` tokens to each; returns the seconds of every `PIECE` of them."""


def draw_rows(cfg: ModelConfig, rows: int, length: int) -> np.ndarray:
    """Returns B rows of T random tokens, int32."""
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (rows, length), dtype=np.int32)


class Jitted:
    """A model of ours in XLA."""

    def __init__(self, model: Model, params: Any, start: int | None = None) -> None:
        """Takes a model with its weights, and the token that an encoder-decoder's decoder begins with."""
        self._model, self._params, self._start = model, params, start
        whole = model.features if model.cfg.head == "none" else model.apply
        self._apply = jax.jit(lambda params, tokens: whole(params, tokens)[0])
        self._prefill = functools.partial(jax.jit(inputs.prefill, static_argnums=(0, 2)), model)

    def writes(self) -> bool:
        """See `Runtime`."""
        return self._model.cfg.head == "language_model" and self._model.cfg.family != "encoder"

    def read(self, rows: int, length: int) -> float:
        """See `Runtime`."""
        tokens = draw_rows(self._model.cfg, rows, length)
        if self.writes():
            batch = inputs.make(self._model.cfg, self._rows(tokens), self._start, 1)
            call = lambda: self._prefill(self._params, inputs.bucket(length + 1), batch)
        else:
            call = lambda: self._apply(self._params, tokens)
        begun = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - begun

    def write(self, rows: int, length: int, count: int) -> list[float]:
        """See `Runtime`; the prompts and the first piece are not counted."""
        chunks = sample.generate(
            self._model,
            self._params,
            self._rows(draw_rows(self._model.cfg, rows, length)),
            max_tokens=count + PIECE,
            how=sample.Sampling(temperature=0.0),
            chunk=PIECE,
            start=self._start,
        )
        seconds, last = [], None
        for _ in chunks:
            now = time.perf_counter()
            if last is not None:
                seconds.append(now - last)
            last = now
        return seconds

    def _rows(self, tokens: np.ndarray) -> Sequence[np.ndarray]:
        return list(tokens)
