"""Learning from a teacher with another tokenizer: language models, on spans of bytes (see `spans`).

    config.distilled.terms = (("cross_entropy", 0.5), ("span_likelihood(temperature=10.0)", 0.5))

Notable: the host writes every batch in the teacher's tokens too (`data.retokenized`), in rows of a length of their own.
A span's loss depends on all of its tokens, whose logits need not exist together: the student's log-likelihoods
are computed once ahead, without a gradient, and say how much each of them weighs; then its logits are made again, chunk
by chunk, with everything else that reads them. So neither model's logits of a row ever exist, for one more
product with the student's head. The teacher reads each row from its beginning, with no memory of the one before.
In evaluation, as in training, it says how much of the text lies in spans, and what both models need for it, in bits per
byte. Left out: several teachers; what is inside models (their places are others); cached targets; on-policy texts.

Dims: B batch, T predictions of a row, S predictions of a teacher's row, N numbers of spans.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.compress import schedules, teachers
from fastlm.compress.mixture import NAME, OWN, PREFIX, WHERE
from fastlm.compress.setting import Setting
from fastlm.compress.spans import SharedTokens, SpanLikelihood, SpanTerm, beginnings, begins, bins_of, totals
from fastlm.compress.teachers import Teacher
from fastlm.data.retokenized import OTHER_SPANS, SPANS, Retokenized, Retokenizer, spelled
from fastlm.data.retokenized import PREFIX as OTHER
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError
from fastlm.ops.chunked_loss import MASK, Head, Objective, chunked_loss
from fastlm.ops.cross_entropy import TARGETS, CrossEntropy, chunked_scores
from fastlm.tasks.language_modeling import LanguageModeling
from fastlm.tasks.task import Read, Task

VALUE, SLOPE, TAUGHT, BEGINS = "span_value", "span_slope", "taught", "begins"
SAMPLE = 1 << 16  # characters of text by which lengths are compared
MARGIN = 1.2  # rows differ, by a fifth where they have few tokens
SPELLED = "Fellow citizens, in 1790 we met."
NATS_PER_BIT = math.log(2)


class Weighted(NamedTuple):
    """A term, its name in metrics, and step -> weight and temperature; the task's own loss has neither of two."""

    name: str
    weight: schedules.Schedule
    term: SpanTerm | None = None
    temperature: schedules.Schedule | None = None


def load(
    setting: Setting, workdir: str, step: str, dtype: str, weights: str, length: int
) -> tuple[Teacher, Retokenizer]:
    """Reads a teacher and its tokenizer; arguments as in `teachers.load`.

    Args:
      length: S; 0 for what the beginning of the training texts needs.

    Raises:
      UserError: as `teachers.load`; a task other than language modeling; a tokenizer that changes the text.
    """
    where = f"{WHERE}.teachers: {workdir}"
    if not isinstance(setting.kind, LanguageModeling):
        raise UserError(f"{WHERE}.terms: only language models learn from spans; take terms that compare by place")
    found = setting.checkpoint(workdir, step)
    check_spelling(found.tokenizer, where)
    check_spelling(setting.tokenizer, "config.tokenizer")
    most = found.cfg.max_length
    if length > most:
        raise UserError(f"{where} reads at most {most} tokens, {WHERE}.teacher_length is {length}; lower it")
    needed = length or measured_length(setting, found.tokenizer)
    if needed > most:
        raise UserError(
            f"{where} reads at most {most} tokens, and rows of config.data.length={setting.length} need about {needed} "
            f"of its own; lower that, or set {WHERE}.teacher_length to {most} and lose their ends"
        )
    length = needed
    theirs = dataclasses.replace(setting, tokenizer=found.tokenizer, length=length)
    return teachers.load(theirs, workdir, step, dtype, weights), Retokenizer(setting.tokenizer, found.tokenizer, length)


def check_spelling(tokenizer: Tokenizer, where: str) -> None:
    """Raises a `UserError` for a tokenizer whose tokens do not join to the text."""
    if spelled(tokenizer, tokenizer.encode(SPELLED))[0].removeprefix(b" ") != SPELLED.encode():
        raise UserError(
            f"{where}: its tokenizer changes the text (cases, spaces), so its tokens stand for no bytes of it; take "
            "one that does not, byte-level BPE or SentencePiece"
        )


def measured_length(setting: Setting, other: Tokenizer) -> int:
    """Returns how many tokens of the other tokenizer's rows need, from how it writes the first training texts."""
    texts = [documents[0][:SAMPLE] for documents in setting.documents() if len(documents)]
    counts = [(len(other.encode(text)), len(setting.tokenizer.encode(text))) for text in texts]
    ratios = [theirs / own for theirs, own in counts if own]
    if not ratios:
        raise UserError(f"{WHERE}.teacher_length: there is no text to measure it by; set it")
    return 8 * math.ceil(setting.length * max(ratios) * MARGIN / 8)


@dataclasses.dataclass(frozen=True)
class Aligned:
    """The objective: the task's own loss, and terms of spans, on the student's logits.

    Of a piece it reads what the task's own reads, and "span_value" and "span_slope" [B, c]: what each prediction adds
    to the loss, and the gradient of the loss by its negative log-likelihood; "taught" [B, c, D], the teacher's hidden
    state after the same bytes, and "begins" [B, c], 1 where there is one. `shared` has "weights" and "temperatures" by
    term, "bins", and "head", what the teacher's head reads.

    Attributes:
      own: the task's.
      terms: those that compare next tokens, by name.
      head: the teacher's.
    """

    own: Objective
    terms: tuple[tuple[str, SharedTokens], ...]
    head: Head

    def __call__(self, logits: Float[Array, "B c V"], shared: Any, piece: Mapping[str, Array]) -> tuple[Array, Any]:
        """Returns (the weighted sum, scores: the task's own, and each term's)."""
        loss, own = self.own(logits, (), piece)
        more, terms = self._next_tokens(logits, self._taught(shared, piece), shared, piece)
        return shared["weights"][OWN] * loss + piece[VALUE] + more, {"own": own, "terms": terms | {OWN: loss}}

    def with_gradient(self, logits: Array, shared: Any, piece: Mapping[str, Array]) -> tuple[Array, Any, Array]:
        """Returns the same and the gradient by the student's logits."""
        loss, own, gradient = self.own.with_gradient(logits, (), piece)
        _, _, by_likelihood = CrossEntropy().with_gradient(logits, (), piece)
        taught = self._taught(shared, piece)

        def summed(logits: Array) -> tuple[Array, Any]:
            more, terms = self._next_tokens(logits, taught, shared, piece)
            return jnp.sum(more), (more, terms)

        towards, (more, terms) = jax.grad(summed, has_aux=True)(logits)
        weight = shared["weights"][OWN]
        gradient = weight * gradient + piece[SLOPE][..., None] * by_likelihood + towards
        return weight * loss + piece[VALUE] + more, {"own": own, "terms": terms | {OWN: loss}}, gradient

    def _taught(self, shared: Any, piece: Mapping[str, Array]) -> Array | None:
        return self.head(shared["head"], piece[TAUGHT]).astype(jnp.float32) if self.terms else None

    def _next_tokens(self, logits: Array, taught: Any, shared: Any, piece: Mapping[str, Array]) -> tuple[Array, dict]:
        total, found = jnp.zeros(logits.shape[:-1], jnp.float32), {}
        for name, term in self.terms:
            found[name] = piece[BEGINS] * term(taught, logits, shared["bins"], shared["temperatures"][name])
            total += shared["weights"][name] * found[name]
        return total, found


@dataclasses.dataclass(frozen=True)
class AcrossTokenizers:
    """A task and what makes it one that learns from a teacher with another tokenizer."""

    inner: Task
    setting: Setting
    teacher: Teacher
    retokenizer: Retokenizer
    terms: tuple[Weighted, ...]

    def task(self) -> Task:
        """Returns the task."""
        sizes = self.setting.model.cfg.vocab_size, self.teacher.cfg.vocab_size
        own = {
            "teacher": self.teacher.constants,
            "bins": bins_of(self.setting.tokenizer, self.retokenizer.other, *sizes),
        }
        return dataclasses.replace(
            self.inner,
            loss=self._loss,
            summarize=self._summarize,
            remarks=self._remarks,
            constants={**self.inner.constants, NAME: own},
            origins=self.inner.origins | {self.teacher.name: self.teacher.fingerprint},
            join=lambda batches: Retokenized(batches, self.retokenizer),
            join_evaluation=lambda batches: map(self.retokenizer, batches),
        )

    def _loss(self, weights, constants, carry, batch, step, rng):
        predictions, own = self.inner.predictions, constants[NAME]
        read = predictions.read(weights, constants, carry, batch, rng, ())
        taught, taught_nll = self._taught(own["teacher"], batch)
        at = {one.name: one.weight(step) for one in self.terms}
        temperatures = {one.name: one.temperature(step) for one in self.terms if one.temperature is not None}
        spans, count = batch[SPANS], batch[SPANS].shape[1]
        params, firsts = predictions.head_params(weights), beginnings(batch[OTHER_SPANS], count)
        values, placed = self._spans(
            params, read, spans, totals(taught_nll, batch[OTHER_SPANS], count), at, temperatures
        )
        places = jnp.take_along_axis(firsts, spans, axis=1)
        pieces = read.pieces | placed | {BEGINS: begins(spans)}
        pieces[TAUGHT] = jnp.take_along_axis(taught.hidden, places[..., None], axis=1)
        shared = {"weights": at, "temperatures": temperatures, "bins": own["bins"]}
        shared["head"] = self.teacher.task.predictions.head_params(own["teacher"]["weights"])
        total, scores = chunked_loss(
            self._objective(), predictions.head, params, read.hidden, shared, pieces, chunk=predictions.chunk
        )
        mask = read.pieces[MASK]
        terms = values | {name: jnp.sum(value * mask) for name, value in scores["terms"].items()}
        sums = predictions.sums(scores["own"], read.pieces, constants)
        sums |= {f"{PREFIX}term/{name}": value for name, value in terms.items()}
        sums |= {f"{PREFIX}weight/{name}": weight * jnp.sum(mask) for name, weight in at.items()}
        aligned, text_bytes = (spans > 0).astype(jnp.float32), constants["token_bytes"]
        sums |= {
            f"{PREFIX}count": jnp.sum(mask),
            f"{PREFIX}nll": jnp.sum(scores["own"].nll * aligned),
            f"{PREFIX}teacher_nll": jnp.sum(taught_nll * (batch[OTHER_SPANS] > 0)),
            f"{PREFIX}bytes": jnp.sum(jnp.take(text_bytes, batch["targets"], mode="clip") * aligned),
        }
        return total, jnp.sum(mask), (read.carry, {"sums": sums})

    def _taught(self, constants: Any, batch: Mapping[str, Array]) -> tuple[Read, Float[Array, "B S"]]:
        """What the teacher makes of its tokens, and their negative log-likelihoods; nothing is differentiated."""
        task, weights = self.teacher.task, constants["weights"]
        theirs = {name.removeprefix(OTHER): value for name, value in batch.items() if name.startswith(OTHER)}
        read = jax.lax.stop_gradient(task.predictions.read(weights, constants["task"], (), theirs, None, ()))
        params = task.predictions.head_params(weights)
        scores = chunked_scores(
            task.predictions.head, params, read.hidden, read.pieces[TARGETS], chunk=task.predictions.chunk
        )
        return read, jax.lax.stop_gradient(scores.nll)

    def _spans(
        self, params: Any, read: Read, spans: Array, taught: Float[Array, "B N"], weights: Any, temperatures: Any
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Returns (the sum of each term of spans, the pieces "span_value" and "span_slope" of all of them)."""
        predictions, targets = self.inner.predictions, read.pieces[TARGETS]
        fixed = jax.lax.stop_gradient((params, read.hidden))
        nll = chunked_scores(predictions.head, *fixed, targets, chunk=predictions.chunk).nll

        def weighed(nll: Array) -> tuple[Array, Any]:
            whole, of_all, sums = totals(nll, spans, spans.shape[1]), jnp.zeros_like(taught), {}
            for one in self.terms:
                if isinstance(one.term, SpanLikelihood):
                    values = one.term(taught, whole, temperatures[one.name])
                    of_all, sums[one.name] = of_all + weights[one.name] * values, jnp.sum(values)
            return jnp.sum(of_all), (of_all, sums)

        slope, (of_all, sums) = jax.grad(weighed, has_aux=True)(nll)
        value = jnp.take_along_axis(of_all, spans, axis=1) * begins(spans)
        return sums, {VALUE: value, SLOPE: slope}

    def _objective(self) -> Aligned:
        terms = tuple((one.name, one.term) for one in self.terms if isinstance(one.term, SharedTokens))
        return Aligned(self.inner.predictions.objective, terms, self.teacher.task.predictions.head)

    def _summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        metrics = self.inner.summarize({name: value for name, value in sums.items() if not name.startswith(PREFIX)})
        ours = {name.removeprefix(PREFIX): float(value) for name, value in sums.items() if name.startswith(PREFIX)}
        if not ours:  # what a trained student says alone, when it is scored
            return metrics
        count, text_bytes = max(ours.pop("count"), 1.0), ours.pop("bytes")
        for name, metric in (("nll", "bits_per_aligned_byte"), ("teacher_nll", "teacher_bits_per_aligned_byte")):
            metrics[metric] = ours.pop(name) / NATS_PER_BIT / max(text_bytes, 1.0)
        metrics["aligned"] = text_bytes / max(float(sums["bytes"]), 1.0)
        return metrics | {name.replace("/", "_"): value / count for name, value in ours.items()}

    def _remarks(self, metrics: dict[str, float]) -> tuple[str, ...]:
        lines = self.inner.remarks(metrics)
        teacher, student = (
            metrics.get("teacher_bits_per_aligned_byte", 0.0),
            metrics.get("bits_per_aligned_byte", math.inf),
        )
        if teacher > student:
            lines += (
                f"warning: the teacher is worse than the student here ({teacher:.4f} against {student:.4f} bits per "
                "byte); give 'cross_entropy' more weight, or find a better teacher",
            )
        if metrics.get("aligned", 1.0) < 0.5:
            lines += (
                f"warning: only {metrics['aligned']:.0%} of the bytes lie in spans that the teacher judges; raise "
                f"{WHERE}.teacher_length above {self.retokenizer.length}, or find a teacher whose tokens end more "
                "often where the student's do",
            )
        return lines
