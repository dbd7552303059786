"""An exported model, in whatever runs it, that looks like one of ours: the same tasks score it, and it writes texts.

Notable: `features` gives what the program gave: `head` and `pool` have nothing left to do. Drawing is
`decoding.sample`'s, with its keys and rules, so that the same logits make the same text. Writing is a loop on the host
around the runtime's own cache; a search moves rows of it between steps.
Left out: drafts and captures, which need the inside of a model.

Dims: B batch, T time, S source time, V vocab.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fastlm import configuration
from fastlm.data import tokenizers
from fastlm.decoding import beam, hypotheses, inputs, sample
from fastlm.decoding.hypotheses import Hypotheses, Settings
from fastlm.decoding.rules import Rules
from fastlm.errors import UserError
from fastlm.exports.exported_programs import Decoding, ExportedPrograms
from fastlm.measurement import runtimes
from fastlm.models import Compute, Model, ModelConfig
from fastlm.ops.caches import Memory
from fastlm.training.restore import Restored

ABOUT = "about.json"  # of the checkpoint that was exported
TOKENIZER = "tokenizer.fastlm.json"
GREEDY = sample.Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class ExportedModel(Model):
    """See the header; its parameters are `programs.params()`."""

    programs: ExportedPrograms | None = None

    def features(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        memory: Memory | None = None,
        packed: bool = True,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """Returns what the program "forward" gives; see `Model.features`.

        Raises:
          UserError: what the program does not have.
        """
        if any(options.get(name) is not None for name in ("cache", "rng")) or options.get("capture"):
            raise UserError("an exported model has no caches, dropout or captures; use --runtime jax")
        given = {"tokens": tokens}
        if memory is None:
            given["segments"] = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        else:
            given |= {"source": memory.hidden, "source_segments": memory.segments}
        if self.cfg.family == "encoder" and self.cfg.token_types:
            given["token_types"] = jnp.zeros_like(tokens) if token_types is None else token_types
        fixed = self.programs.length_of("forward")
        if fixed is not None and tokens.shape[1] > fixed:
            raise UserError(f"rows of {tokens.shape[1]} tokens; the model was exported for {fixed} (--length)")
        self.programs.open("forward")  # what is wrong with it is said here: a callback's errors come as stack traces
        return self.programs.forward(params, given), {}

    def encode(
        self, params: Any, source: Int[Array, "B S"], *, segment_ids: Int[Array, "B S"] | None = None, **options: Any
    ) -> tuple[Memory, dict[str, Any]]:
        """Returns the source as it is: the graph encodes and decodes at once."""
        del params, options
        return Memory(source, jnp.ones_like(source) if segment_ids is None else segment_ids), {}

    def head_params(self, params: Any) -> dict[str, Any]:
        """Returns nothing; the head is in the graph."""
        del params
        return {}

    def head(self, params: Any, hidden: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """Returns what `features` gave: logits already."""
        del params
        return hidden

    def pool(self, hidden: Float[Array, "..."], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B D"]:
        """Returns what stands for each text; the graph of an encoder that classifies texts has pooled already."""
        classifies = self.cfg.family == "encoder" and self.cfg.head == "sequence"
        return hidden if classifies else super().pool(hidden, segment_ids)

    def check_prompts(self, batch: inputs.Inputs) -> None:
        """Opens what reads prompts.

        Raises:
          UserError: a model exported without what writing takes, or for other lengths, or for another runtime.
        """
        if not self.programs.has("prefill"):
            raise UserError(f"{self.programs.folder}: exported without the programs that write; this kind has none")
        fixed, longest = self.programs.length_of("prefill"), batch.lengths.max()
        if fixed is not None and longest > fixed:
            raise UserError(f"a prompt has {longest} tokens, but the model was exported for {fixed}")
        self.programs.open("prefill")

    def begin(self, params: Any, batch: inputs.Inputs, max_tokens: int) -> tuple[Decoding, Float[np.ndarray, "B V"]]:
        """Reads prompts; returns what goes on from them, with room for so many tokens more, and logits behind each."""
        self.check_prompts(batch)
        prompts, lengths = np.asarray(batch.prompts), np.asarray(batch.lengths)
        fixed = self.programs.length_of("prefill")
        if fixed is not None:
            prompts = np.pad(prompts, ((0, 0), (0, max(fixed - prompts.shape[1], 0))))[:, :fixed]
        source = {} if batch.sources is None else {"source": batch.sources, "source_segments": batch.segments}
        slots = inputs.bucket(max(prompts.shape[1], int(lengths.max()) + max_tokens))
        rows = self.programs.decoding(params, slots)
        return rows, rows.begin(prompts, lengths, source)


@sample.run.register
def _write(
    model: ExportedModel,
    params: Any,
    batch: inputs.Inputs,
    keys: Array,
    max_tokens: int,
    how: sample.Sampling,
    rules: Rules,
    chunk: int,
) -> Iterator[np.ndarray]:
    """Returns what yields new tokens [B, 1]; refuses what cannot be read at the call, before anything is shown."""
    del chunk
    model.check_prompts(batch)
    return _written(model, params, batch, keys, max_tokens, how, rules)


def _written(
    model: ExportedModel,
    params: Any,
    batch: inputs.Inputs,
    keys: Array,
    max_tokens: int,
    how: sample.Sampling,
    rules: Rules,
) -> Iterator[np.ndarray]:
    rows, logits = model.begin(params, batch, max_tokens)
    lengths, likeliest = np.asarray(batch.lengths), _Likeliest(rules)
    for count in range(max_tokens):
        if how.temperature == 0:
            token = likeliest(logits, count)
        else:
            token = np.asarray(_drawn(how, rules, logits, keys, lengths + count, np.int32(count)))
        yield token[:, None]
        if count + 1 < max_tokens:
            logits = rows.step(token)


@beam.run.register
def _search(model: ExportedModel, params: Any, batch: inputs.Inputs, beams: int, settings: Settings) -> Hypotheses:
    """Searches with each beam as a row; rows whose beam goes on as another's take its cache."""
    limit, count = int(settings.limit), len(batch.lengths)
    rows, logits = model.begin(params, batch, limit)
    found, _ = _advanced(hypotheses.empty(count, beams, inputs.bucket(limit)), logits[:, None], settings)
    rows.follow(np.repeat(np.arange(count), beams))
    each = np.arange(count * beams).reshape(count, beams)
    parents = np.arange(beams)
    while not found.done.all():
        before = each[:, :1] + np.asarray(parents)
        if (before != each).any():
            rows.follow(before.ravel())
        logits = rows.step(np.asarray(found.tokens)[:, :, int(found.written) - 1].ravel())
        found, parents = _advanced(found, logits.reshape(count, beams, -1), settings)
    return found


_advanced = jax.jit(hypotheses.advance)


class _Likeliest:
    """The likeliest token that is allowed, on the host: a call of jit between two of the runtime's costs a tenth."""

    def __init__(self, rules: Rules) -> None:
        self._forbidden = np.asarray(rules.forbidden)
        self._end, self._min_tokens, self._first = (int(x) for x in (rules.end, rules.min_tokens, rules.forced_first))

    def __call__(self, logits: np.ndarray, written: int) -> np.ndarray:
        """Returns a token for each row of logits [B, V]; see `Rules.allow`."""
        if self._first >= 0 and written == 0:
            return np.full(len(logits), self._first, np.int32)
        hidden = np.flatnonzero(self._forbidden)
        hidden = np.append(hidden, self._end) if written < self._min_tokens and self._end >= 0 else hidden
        if hidden.size:
            logits = logits.copy()
            logits[:, hidden] = -np.inf
        return logits.argmax(axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _drawn(how: sample.Sampling, rules: Rules, logits: Array, keys: Array, places: Array, written: Array) -> Array:
    """Draws a token for each row; `places` are those of the tokens in their rows, which choose the keys."""
    position_keys = jax.vmap(jax.random.fold_in)(keys, places)
    return sample.draw(rules.allow(logits, written), position_keys, how)


class Timed:
    """An exported model on the ruler; see `measurement.runtimes.Runtime`."""

    def __init__(self, model: ExportedModel, params: Any, start: int | None = None) -> None:
        """Takes a model with its weights, and the token that an encoder-decoder's decoder begins with."""
        self._model, self._params, self._start = model, params, start
        self._features = jax.jit(lambda params, tokens: model.features(params, tokens)[0])

    def writes(self) -> bool:
        """See `Runtime`."""
        return self._model.programs.has("prefill") and self._model.cfg.head == "language_model"

    def read(self, rows: int, length: int) -> float:
        """See `Runtime`."""
        tokens = runtimes.draw_rows(self._model.cfg, rows, length)
        if self.writes():
            written = self._write(list(tokens), 1)
            begun = time.perf_counter()
            next(written)
        else:
            begun = time.perf_counter()
            self._features(self._params, tokens).block_until_ready()
        return time.perf_counter() - begun

    def write(self, rows: int, length: int, count: int) -> list[float]:
        """See `Runtime`; the prompts and the first piece are not counted."""
        tokens = list(runtimes.draw_rows(self._model.cfg, rows, length))
        seconds, last = [], None
        for number, _ in enumerate(self._write(tokens, count + runtimes.PIECE), 1):
            if number % runtimes.PIECE == 0:
                now = time.perf_counter()
                seconds += [] if last is None else [now - last]
                last = now
        return seconds

    def _write(self, rows: list[np.ndarray], count: int) -> Iterator[np.ndarray]:
        return sample.generate(self._model, self._params, rows, max_tokens=count, how=GREEDY, start=self._start)


def restore(programs: ExportedPrograms) -> Restored:
    """Returns an exported model as what a checkpoint gives.

    Raises:
      UserError: what lies beside the programs cannot be read.
    """
    folder = programs.folder
    try:
        about = json.loads((folder / ABOUT).read_text())
        cfg = ModelConfig.from_json(json.dumps(about["model"]))
        tokenizer = tokenizers.from_json((folder / TOKENIZER).read_text())
        compute = configuration.make(Compute, "compute", about["config"].get("compute", {}))
        step = about["step"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: {ABOUT} or {TOKENIZER} cannot be read ({error}); export again") from None
    model = ExportedModel(cfg, dataclasses.replace(compute, dtype="float32"), programs)
    return Restored(model, programs.params(), tokenizer, about, step)
