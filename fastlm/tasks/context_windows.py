"""A question and its context as rows of bounded length: long contexts become windows that overlap.

    [class] question [separator] context [separator]      token types 0 0 0 1 1

or whatever special tokens the model came with for pairs (`rows.row_layout`).

Notable: each window is a row of its own, in training and in evaluation. Tokens know the characters of the
context that they stand for, so an answer is cut out of the text and never decoded. The last window
is moved back until it is full. Where windows begin is cached, as encoded rows are. A question that takes
more than half of a row is cut at its end, never silently: how many were is logged at every start.

Dims: N tokens of the context, T tokens of a row.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlm.data.directory import data_directory
from fastlm.data.documents import digest
from fastlm.data.encoded import CUT, EncodedExamples
from fastlm.data.examples import Examples, Row
from fastlm.data.tokenizers import Tokenizer
from fastlm.data.tokenizers.layout import Layout
from fastlm.errors import UserError
from fastlm.tasks.rows import reading_fingerprint, row_layout

FIRST, WHERE = "#first", "#row"
"""Fields added to a row: its window's first token of the context, and the row's number and source, for a person."""


class Window(NamedTuple):
    """One row.

    Attributes:
      tokens, token_types: int32 [T].
      context_first, context_stop: places in the row of the context's first token here, and behind its last.
      skipped: tokens of the context before this window.
      starts, ends: int32 [N], the characters of the context that each of its tokens stands for.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    context_first: int
    context_stop: int
    skipped: int
    starts: np.ndarray
    ends: np.ndarray

    def places(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the places in the row of the first and last token of characters start ... stop - 1.

        (0, 0), where no context stands, if the window does not hold all of them.
        """
        inside = np.flatnonzero((self.ends > start) & (self.starts < stop))
        if not len(inside):
            return 0, 0
        first, last = (int(token) - self.skipped + self.context_first for token in inside[[0, -1]])
        return (first, last) if self.context_first <= first and last < self.context_stop else (0, 0)

    def characters(self, first: int, last: int) -> slice:
        """Returns the characters of the context from the token at place `first` to that at `last`."""
        offset = self.skipped - self.context_first
        return slice(int(self.starts[first + offset]), int(self.ends[last + offset]))


@dataclasses.dataclass(frozen=True)
class Windowing:
    """How questions and contexts are laid out in rows of at most `length` tokens; windows share `overlap` of them."""

    tokenizer: Tokenizer
    length: int
    overlap: int

    def __post_init__(self) -> None:
        least = self.length - self.layout.size - self._longest_question
        if least <= self.overlap:
            raise UserError(
                f"config.task.stride: windows share {self.overlap} tokens, but data.length {self.length} leaves only "
                f"{max(least, 0)} of the context beside a long question; lower it, or raise data.length"
            )

    @property
    def layout(self) -> Layout:
        """The special tokens around question and context."""
        return row_layout(self.tokenizer, 2)

    @property
    def _longest_question(self) -> int:
        return self.length // 2

    @property
    def fingerprint(self) -> str:
        """Hex digest: equal ones cut equally."""
        return digest("windows 1", reading_fingerprint(self.tokenizer), f"{self.length} {self.overlap}")

    def firsts(self, question: str, context: str) -> np.ndarray:
        """Returns the first token of the context in each window, int32 [windows >= 1]."""
        room = self.length - self.layout.size - len(self._question(question))
        tokens = len(self.tokenizer.encode(context))
        count = 1 + max(0, -(-(tokens - room) // (room - self.overlap)))
        firsts = np.arange(count) * (room - self.overlap)
        return np.minimum(firsts, max(0, tokens - room)).astype(np.int32)

    def window(self, question: str, context: str, first: int) -> Window:
        """Returns the row whose context begins with token `first`."""
        asked, layout = self._question(question), self.layout
        ids, starts, ends = self.tokenizer.encode_with_offsets(context)
        part = ids[first : first + self.length - layout.size - len(asked)]
        tokens, types = layout.join([asked, part])
        stop = len(tokens) - len(layout.special[-1])
        return Window(tokens, types, stop - len(part), stop, first, starts, ends)

    def cut(self, question: str) -> tuple[str, ...]:
        """Returns what `encoded.CUT` says of a question."""
        fits = len(self.tokenizer.encode(question)) <= self._longest_question
        return () if fits else (f"questions at their end, to half of config.data.length={self.length} tokens",)

    def _question(self, question: str) -> np.ndarray:
        return self.tokenizer.encode(question)[: self._longest_question]


class ContextWindows(Examples):
    """The windows of other examples, each as its row with the fields `FIRST` and `WHERE` added."""

    def __init__(
        self,
        base: Examples,
        windowing: Windowing,
        *,
        question: str,
        context: str,
        data_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Cuts the rows of `base`, of which `question` and `context` are fields.

        Raises:
          UserError: the cache cannot be written.
        """
        key = digest(windowing.fingerprint, question, context)

        def encode(row: Row) -> dict[str, Any]:
            asked = str(row[question])
            return {"first": windowing.firsts(asked, str(row[context])), CUT: windowing.cut(asked)}

        cut = EncodedExamples(base, encode, key, data_directory(data_dir))
        self._base = base
        self._records = np.repeat(np.arange(len(base)), cut.lengths[:, 0])
        self._firsts = np.concatenate([cut.array("first", record) for record in range(len(base))])
        self.name, self.fields = base.name, (*base.fields, FIRST, WHERE)
        self.fingerprint = digest("windows", base.fingerprint, key)

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, index: int) -> Row:
        return self.get([index])[0]

    def get(self, indices: Sequence[int]) -> list[Row]:
        """Returns several windows."""
        records = [int(self._records[index]) for index in indices]
        return [
            {**row, FIRST: int(self._firsts[index]), WHERE: f"row {record} of {self._base.name}"}
            for index, record, row in zip(indices, records, self._base.get(records))
        ]
