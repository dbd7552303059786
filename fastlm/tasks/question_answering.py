"""Extractive question answering: which span of the context answers a question (SQuAD, arXiv 1606.05250).

Notable: two numbers per token, for the first and the last of the answer, as in BERT (1810.04805). Only the
context can hold them, and place 0, which stands for "not in this window": windows of a long context without
the answer train towards it, as do questions without an answer (1806.03822). A span's score is the sum
of its two logits less that of place 0, which makes windows comparable; the best span of all windows
is said, cut out of the text by characters. Scored by SQuAD's exact match and F1. Of several reference answers
(TFDS `squad`, a list in JSON lines) the first is trained on, and the one that fits best counts in the score.

Dims: B batch, T time.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fastlm.data.bucketing import Encode
from fastlm.data.examples import Examples, Row, every
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError
from fastlm.measurement.answer_scores import answer_scores
from fastlm.models import Model, ModelConfig
from fastlm.ops.chunked_loss import MASK
from fastlm.ops.cross_entropy import TARGETS, CrossEntropy
from fastlm.tasks import cloze
from fastlm.tasks.context_windows import FIRST, WHERE, ContextWindows, Window, Windowing
from fastlm.tasks.kind import Scored, Trained
from fastlm.tasks.rows import RowsKind, predictions, row_layout, rows_by_record, segments
from fastlm.tasks.task import Batch, Predictions, Read, Task, captured, of_model

# Finite, so that sums and differences of what cannot be stay numbers.
IMPOSSIBLE = -1e9
SNIPPET = 80


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(RowsKind):
    """The kind "question_answering".

    Attributes:
      question, context, answer, answer_start: fields; the last is a place in the context, in characters.
      stride: tokens of the context that one window of it shares with the next.
      most_answer_tokens: longest answer that is said.
      unanswerable: whether questions may have no answer (an empty one); then "" is said where no span beats place 0.
      cloze: share of the rows in training that ask for words of their context instead; see `tasks.cloze`.
      gap: text that stands for the missing words then.
    """

    question: str = "question"
    context: str = "context"
    answer: str = "answer"
    answer_start: str = "answer_start"
    stride: int = 32
    most_answer_tokens: int = 30
    unanswerable: bool = False
    cloze: float = 0.0
    gap: str = "___"

    head = "tokens"
    families = ("encoder",)
    classes = 2  # numbers per token

    def __post_init__(self) -> None:
        if self.stride < 0:
            raise UserError(f"config.task.stride: must be at least 0, got {self.stride}")
        if self.most_answer_tokens < 1:
            raise UserError(f"config.task.most_answer_tokens: must be at least 1, got {self.most_answer_tokens}")
        if not 0 <= self.cloze <= 1 or not self.gap:
            raise UserError(f"config.task: cloze must lie in [0, 1] and gap be a text, got {self.cloze}, '{self.gap}'")

    @property
    def text_fields(self) -> tuple[str, ...]:
        """Question and context."""
        return (self.question, self.context)

    def fields_read(self) -> tuple[str, ...]:
        """Question, context, and where the answer stands in it."""
        return (*self.text_fields, self.answer, self.answer_start) if self.answer else self.text_fields

    def unlabelled(self) -> "QuestionAnswering":
        """Reads no answer."""
        return dataclasses.replace(self, answer="", answer_start="")

    def fit(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> ModelConfig:
        """Gives the head its two numbers per token."""
        Windowing(tokenizer, data.length, self.stride)
        return dataclasses.replace(super().fit(cfg, tokenizer, data), classes=self.classes)

    def check(self, cfg: ModelConfig) -> None:
        """Checks that a restored model marks the two ends of a span; one with more numbers tags tokens."""
        super().check(cfg)
        if cfg.classes != self.classes:
            raise UserError(
                f"the model gives {cfg.classes} numbers per token, but answers need {self.classes}, for first and "
                "last; it was trained for something else: fine-tune it"
            )

    def rows(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data, split: str) -> list[tuple[Examples, float]]:
        """Returns the windows of a split's rows."""
        del cfg
        windowing = Windowing(tokenizer, data.length, self.stride)
        fields = {"question": self.question, "context": self.context}
        return [
            (ContextWindows(rows, windowing, **fields, data_dir=data.data_dir), share)
            for rows, share in self.load(data, split)
        ]

    def encoder(self, cfg: ModelConfig, tokenizer: Tokenizer, data: Data) -> Encode:
        """Returns window -> tokens, token types where the model has them, places of context and answer."""
        windowing = Windowing(tokenizer, data.length, self.stride)

        def encode(row: Row) -> dict[str, Any]:
            window = self._window(windowing, row)
            start, stop = self._answer(row)
            first, last = window.places(start, stop) if stop else (0, 0)
            encoded = {
                "tokens": window.tokens,
                "context_first": window.context_first,
                "context_stop": window.context_stop,
                "answer_first": first,
                "answer_last": last,
            }
            return encoded | {"token_types": window.token_types} if cfg.token_types else encoded

        return encode

    def inputs(self, trained: Trained, data: Data, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the first window of a question and its context."""
        row = {**dict(zip(self.text_fields, texts, strict=True)), FIRST: 0}
        return dataclasses.replace(self.unlabelled(), stride=0).read_row(trained, data, row)

    def make(self, model: Model, tokenizer: Tokenizer) -> Task:
        """Returns the task."""
        task = make(model, self.most_answer_tokens)
        if not self.cloze:
            return task
        layout, gap = row_layout(tokenizer, 2), jnp.asarray(tokenizer.encode(f" {self.gap}"))

        def prepare(weights, constants, batch, step, rng):
            del weights, constants, step
            return batch if rng is None else cloze.ask(batch, rng, gap, layout, self.cloze)

        return dataclasses.replace(task, prepare=prepare)

    def score(self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0) -> Scored:
        """Returns exact match and F1 with standard errors over questions, and what was said to each.

        With a limit, questions are scored by those of their windows that were seen.
        """
        rows, said = self.say(trained, data, evaluation, split, limit)
        outputs = [self._expected(row) | one for row, one in zip(rows, said)]
        accepted = [[o["expected"], *o.get("or", ())] for o in outputs]
        scores = answer_scores([o["said"] for o in outputs], accepted)
        metrics = {
            "exact_match": scores.exact_match.value,
            "exact_match_error": scores.exact_match.error,
            "f1": scores.f1.value,
            "f1_error": scores.f1.error,
            "questions": float(len(outputs)),
        }
        return Scored(metrics, outputs)

    def say(
        self, trained: Trained, data: Data, evaluation: Evaluation, split: str, limit: int = 0
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Returns rows (of each question, its window with the best span), and the text of that span."""
        cfg, tokenizer = trained.model.cfg, trained.tokenizer
        found = predictions(trained, self.eval_batches(cfg, tokenizer, data, evaluation, split, limit))
        windows = rows_by_record(self.rows(cfg, tokenizer, data, split), list(found))
        windowing = Windowing(tokenizer, data.length, self.stride)
        spans = best_windows(windows, found.values())
        return [span.row for span in spans], [{"said": self._text(windowing, span)} for span in spans]

    def _window(self, windowing: Windowing, row: Row) -> Window:
        return windowing.window(str(row[self.question]), str(row[self.context]), int(row[FIRST]))

    def _answer(self, row: Row) -> tuple[int, int]:
        """Returns the answer's characters, start and stop; (0, 0) if there is none."""
        if not self.answer:
            return 0, 0
        answer, context, start = str(row[self.answer]), str(row[self.context]), row[self.answer_start]
        if not answer.strip():
            if self.unanswerable:
                return 0, 0
            raise UserError(
                f"{row[WHERE]} has an empty {self.answer}; if questions without an answer are meant, set "
                "config.task.unanswerable=True"
            )
        try:
            start = int(start)
        except ValueError:
            raise UserError(f"{row[WHERE]}: {self.answer_start} {str(start)[:40]!r} is no whole number") from None
        if start < 0 or context[start : start + len(answer)] != answer:
            raise UserError(
                f"{row[WHERE]}: {answer[:40]!r} does not stand at {self.answer_start} {start} of its {self.context}, "
                "counted in characters from 0"
            )
        return start, start + len(answer)

    def _text(self, windowing: Windowing, span: "Span") -> str:
        if span.score <= 0 and self.unanswerable:
            return ""
        characters = self._window(windowing, span.row).characters(span.first, span.last)
        return str(span.row[self.context])[characters].strip()

    def _expected(self, row: Row) -> dict[str, Any]:
        """Returns the question, its answer, what stands around that, and other right answers where there are any."""
        (start, stop), context = self._answer(row), str(row[self.context])
        snippet = context[max(0, start - SNIPPET) : stop + SNIPPET]
        expected = {"question": row[self.question], "context": snippet, "expected": context[start:stop]}
        others = [text for text in dict.fromkeys(row.get(every(self.answer), ())) if text != context[start:stop]]
        return expected | ({"or": others} if others else {})


class Span(NamedTuple):
    """The best span of a window: its score above place 0, its first and last place."""

    row: Row
    score: float
    first: int
    last: int


def best_windows(rows: Iterable[Row], found: Iterable[dict[str, np.ndarray]]) -> list[Span]:
    """Returns the best span of each question, in the order of questions; windows are told apart by `WHERE`."""
    best: dict[Any, Span] = {}
    for row, output in zip(rows, found, strict=True):
        span = Span(row, float(output["score"]), int(output["first"]), int(output["last"]))
        if row[WHERE] not in best or span.score > best[row[WHERE]].score:
            best[row[WHERE]] = span
    return list(best.values())


def make(model: Model, most_answer_tokens: int) -> Task:
    """Returns the task; `predict` gives each window's best span: score, first, last [B]."""

    def read(weights, constants, carry, batch, rng, capture):
        """A row's two predictions, first and last, are distributions over its places: the head comes before them."""
        del constants
        real = segments(batch)
        hidden, aux = model.features(
            weights["model"],
            batch["tokens"],
            segment_ids=real,
            packed=False,
            token_types=batch.get("token_types"),
            rng=rng,
            capture=capture,
        )
        logits = jnp.swapaxes(model.head(weights["model"], hidden), 1, 2)
        possible = in_context(batch).at[:, 0].set(True)
        wanted = jnp.stack([batch["answer_first"], batch["answer_last"]], axis=1)
        mask = jnp.broadcast_to(batch["row_mask"][:, None], wanted.shape)
        logits, pieces = jnp.where(possible[:, None], logits, IMPOSSIBLE), {TARGETS: wanted, MASK: mask}
        return Read(logits, pieces, carry, captured(aux, capture), {"": real})

    def sums(scores, pieces, constants):
        del constants
        mask = pieces[MASK]
        right = jnp.prod(scores.correct, axis=1)
        return {
            "nll": 0.5 * jnp.sum(scores.nll * mask),
            "right": jnp.sum(right * mask[:, 0]),
            "rows": jnp.sum(mask[:, 0]),
        }

    def predict(weights: Any, constants: Any, carry: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
        logits = read(weights, constants, (), batch, None, ()).hidden
        start, end = logits[:, 0], logits[:, 1]
        inside = in_context(batch)
        score, first, last = best_spans(
            jnp.where(inside, start, IMPOSSIBLE), jnp.where(inside, end, IMPOSSIBLE), most_answer_tokens
        )
        return carry, {"score": score - start[:, 0] - end[:, 0], "first": first, "last": last}

    return of_model(
        model.cfg,
        predictions=Predictions(
            read=read,
            head=_as_they_are,
            head_params=lambda weights: {},
            objective=CrossEntropy(),
            sums=sums,
        ),
        summarize=summarize,
        predict=predict,
    )


def _as_they_are(params: Any, logits: Array) -> Array:
    del params
    return logits


def in_context(batch: Batch) -> Bool[Array, "B T"]:
    """Returns where the tokens of the context stand."""
    places = jnp.arange(batch["tokens"].shape[1])
    return (places >= batch["context_first"][:, None]) & (places < batch["context_stop"][:, None])


def best_spans(
    start: Float[Array, "B T"], end: Float[Array, "B T"], most: int
) -> tuple[Float[Array, "B"], Array, Array]:
    """Returns the highest start[i] + end[j] with i <= j < i + most, and its i and j, [B] each."""
    length = start.shape[1]
    behind = jnp.pad(end, ((0, 0), (0, most - 1)), constant_values=2 * IMPOSSIBLE)
    sums = jnp.stack([start + behind[:, more : more + length] for more in range(most)], axis=1)
    sums = sums.reshape(len(start), most * length)
    chosen = jnp.argmax(sums, axis=1)
    more, first = jnp.divmod(chosen, length)
    return jnp.max(sums, axis=1), first, first + more


def summarize(sums: dict[str, Any]) -> dict[str, float]:
    """Returns loss (nats per end of an answer) and the share of windows with both ends right."""
    rows = max(float(sums["rows"]), 1.0)
    return {"loss": float(sums["nll"]) / rows, "span_accuracy": float(sums["right"]) / rows}
