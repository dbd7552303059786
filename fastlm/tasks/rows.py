"""What tasks on rows of fields share: reading, encoding, batches by length, predictions in order of rows.

Notable: a kind says with `encoder` what one row becomes; everything else follows. Over-long texts
are cut (the longer of a pair first), never silently: how many were cut is logged at every start.

Dims: B batch, T time.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from fastlm.data import bucketing, examples
from fastlm.data.batch_iterator import BatchIterator
from fastlm.data.bucketing import Encode
from fastlm.data.documents import Documents, digest
from fastlm.data.examples import Examples, FieldTexts, Row
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.data.tokenizers.layout import Layout, opened_and_closed
from fastlm.errors import UserError, nearest
from fastlm.models import ModelConfig
from fastlm.parallel import multihost
from fastlm.tasks.kind import TaskKind, Trained
from fastlm.tasks.scoring import HostBatch, gather_host, to_device

INPUTS = ("tokens", "token_types", "source")


class RowsKind(TaskKind):
    """A task on rows of fields; subclasses name the `text_fields` they read and give an `encoder`."""

    @property
    @abstractmethod
    def text_fields(self) -> tuple[str, ...]:
        """Fields that hold text the model reads or writes; a tokenizer may be trained on them."""

    @abstractmethod
    def encoder(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> Encode:
        """Returns the function from a row to arrays; "tokens" [T] is among them."""

    def documents(self, data: Data) -> Sequence[Documents]:
        """Returns the texts of the training rows, for a tokenizer to be trained on."""
        loaded = self.load(data, data.split)
        return [FieldTexts(rows, self.text_fields) for rows, _ in loaded]

    def load(self, data: Data, split: str) -> list[tuple[Examples, float]]:
        """Returns the rows of a split, after a look at whether they have the fields asked for."""
        loaded = examples.load_mixture(data.sources, split, data_dir=data.data_dir)
        for rows, _ in loaded:
            for name in self.fields_read():
                if name not in rows.fields:
                    raise UserError(
                        f"config.task: {rows.name} has no field '{name}'{nearest(name, rows.fields)} "
                        f"(it has: {', '.join(rows.fields)})"
                    )
        return loaded

    def fields_read(self) -> tuple[str, ...]:
        """Returns every field that rows must have."""
        return self.text_fields

    def rows(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, split: str) -> list[tuple[Examples, float]]:
        """Returns what `encoder` is given one by one: the rows of a split, or what a task cuts them into."""
        del cfg, tokenizer
        return self.load(data, split)

    @abstractmethod
    def say(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Returns rows of a split, and what the model says of each: "said", and more where there is more."""

    @abstractmethod
    def unlabelled(self) -> "RowsKind":
        """Returns this kind for rows that have no right answers beside them: fields without a name are not read."""

    def first_example(self, data: Data, split: str) -> list[str]:
        """Returns the text fields of the first row of a split, which may lack what a model can say itself."""
        row = self.unlabelled().load(data, split)[0][0][0]
        return [str(row[name]) for name in self.text_fields if name in row]

    def completed(self, trained: Trained, data: Data, texts: Sequence[str]) -> list[str]:
        """Returns the texts, which must be as many as the fields that are read."""
        del trained, data
        if len(texts) != len(self.text_fields):
            fields = " and ".join(self.text_fields)
            raise UserError(f"--text: this task reads {fields}, give --text for each in this order; got {len(texts)}")
        return list(texts)

    def inputs(self, trained: Trained, data: Data, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns what the model reads of a row of these texts."""
        return self.unlabelled().read_row(trained, data, dict(zip(self.text_fields, texts, strict=True)))

    def read_row(self, trained: Trained, data: Data, row: Row) -> dict[str, np.ndarray]:
        """Returns, of what `encoder` makes of a row, what the model is given."""
        encoded = self.encoder(trained.model.cfg, trained.tokenizer, data)(row)
        return {name: encoded[name] for name in INPUTS if name in encoded}

    def answers(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> list[dict[str, Any]]:
        """Returns what is read of each row and what the model says of it."""
        kind = self.unlabelled()
        rows, said = kind.say(trained, data, evaluation, split, limit)
        return [{name: row[name] for name in kind.text_fields} | one for row, one in zip(rows, said)]

    def train_batches(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, seed: int) -> BatchIterator:
        """Returns batches of rows of like length."""
        return bucketing.training_batches(
            self.rows(cfg, tokenizer, data, data.split),
            self.encoder(cfg, tokenizer, data),
            batch_size=data.batch_size,
            seed=seed,
            prefetch=data.prefetch,
            **self._encoding(cfg, tokenizer, data),
        )

    def eval_batches(
        self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, evaluation: Evaluation, split: str, limit: int
    ) -> Iterator[HostBatch]:
        """Returns every row once, sorted by length."""
        return bucketing.evaluation_batches(
            self.rows(cfg, tokenizer, data, split),
            self.encoder(cfg, tokenizer, data),
            batch_size=evaluation.batch_size or data.batch_size,
            limit=limit,
            **self._encoding(cfg, tokenizer, data),
        )

    def _encoding(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> dict[str, Any]:
        told = (repr(self), cfg.family, str(cfg.token_types), str(data.length), str(data.source_length))
        return {
            "encoder_fingerprint": digest(type(self).__name__, reading_fingerprint(tokenizer), *told),
            "buckets": data.buckets or default_buckets(max(data.length, data.source_length)),
            "data_dir": data.data_dir,
            **multihost.this_process(),
        }


def default_buckets(longest: int) -> tuple[int, ...]:
    """A quarter, a half and the whole of the longest length."""
    return tuple(sorted({max(1, longest // 4), max(1, longest // 2), longest}))


class Joined(NamedTuple):
    """Texts as one row: tokens and token types, int32 [T] each, and what `encoded.CUT` says of it."""

    tokens: np.ndarray
    token_types: np.ndarray
    cut: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Joiner:
    """Puts one or two texts between the tokenizer's special tokens, as `row_layout` says, cut to `length` tokens."""

    tokenizer: Tokenizer
    length: int

    def __call__(self, first: str, second: str | None = None) -> Joined:
        """Returns a row of T <= length tokens.

        Raises:
          UserError: no room for any text between the special tokens.
        """
        parts = [self.tokenizer.encode(text) for text in (first, second) if text is not None]
        layout = row_layout(self.tokenizer, len(parts))
        room = self.length - layout.size
        if room < len(parts):
            raise UserError(f"config.data.length: {self.length} leaves no room for text; raise it")
        limits = (f"texts at their end, to config.data.length={self.length} tokens",)
        return Joined(*layout.join(self._cut(parts, room)), limits if sum(map(len, parts)) > room else ())

    def _cut(self, parts: list[np.ndarray], room: int) -> list[np.ndarray]:
        excess = sum(map(len, parts)) - room
        if excess <= 0:
            return parts
        if len(parts) == 1:
            return [parts[0][:room]]
        # The longer one gives until both are equal, then each in turn.
        one, two = map(len, parts)
        keep = min(one, max(room - two, room // 2)) if one >= two else room - min(two, max(room - one, room // 2))
        return [parts[0][:keep], parts[1][: room - keep]]


def row_layout(tokenizer: Tokenizer, texts: int) -> Layout:
    """Returns which special tokens stand around one text, or two: those that the model came with.

    Where nothing says so, as BERT has it: `[class] first [separator] second [separator]`, without what the tokenizer
    lacks.
    """
    start = tokenizer.special("class")
    start = tokenizer.bos if start is None else start
    end = tokenizer.special("separator")
    end = tokenizer.eos if end is None else end
    return tokenizer.layout(texts) or opened_and_closed([] if start is None else [start], [end], texts)


def reading_fingerprint(tokenizer: Tokenizer) -> str:
    """Hex digest: equal ones give equal ids, and stand them between equal special tokens."""
    own = [repr(layout) for layout in map(tokenizer.layout, (1, 2)) if layout is not None]
    return digest(tokenizer.fingerprint, *own) if own else tokenizer.fingerprint


def segments(batch: dict[str, Array], name: str = "tokens") -> Int[Array, "B T"]:
    """Returns 1 where a padded array of a batch is real, 0 behind its length."""
    return (jnp.arange(batch[name].shape[1]) < batch[f"{name}_length"][:, None]).astype(jnp.int32)


def predictions(trained: Trained, batches: Iterator[HostBatch]) -> dict[int, dict[str, np.ndarray]]:
    """Runs a task's `predict` over all rows; returns record -> outputs, by rising record."""
    predict, found = jax.jit(trained.task.predict), {}
    for batch in batches:
        _, outputs = predict(trained.weights, trained.task.constants, (), to_device(batch, trained.mesh))
        outputs = {name: gather_host(value) for name, value in outputs.items()}
        for row, record in enumerate(gather_host(batch["record"]).tolist()):
            if record >= 0:
                found[record] = {name: value[row] for name, value in outputs.items()}
    return dict(sorted(found.items()))


def rows_by_record(loaded: list[tuple[Examples, float]], records: Sequence[int]) -> list[Row]:
    """Returns the rows of records that are numbered through all sources."""
    starts = np.cumsum([0] + [len(rows) for rows, _ in loaded])
    where = [int(np.searchsorted(starts, record, side="right")) - 1 for record in records]
    return [loaded[source][0][int(record - starts[source])] for source, record in zip(where, records)]
