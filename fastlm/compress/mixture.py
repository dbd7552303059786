"""The objective of distillation: a task's own loss and distances from a teacher's distribution, on the same logits.

Notable: student's and teacher's logits exist for one chunk of predictions at a time (`ops.chunked_loss`), the student's
are computed once for all terms, and a teacher is never differentiated. Several teachers are one: the mean of their
probabilities. Temperatures divide both sides' logits, and the term is multiplied by their square, so that
gradients keep their size (arXiv 1503.02531). Vocabularies that were padded differently are compared on what
they have in common.
In evaluation it also says, at a temperature of 1, how far student and teacher are apart (KL), how often they agree on
the likeliest, the teacher's own loss, and what both make of their confidence (calibration in bins, arXiv 1706.04599).

Dims: B batch, c predictions of a chunk, V what is chosen from.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastlm.ops import divergences
from fastlm.ops.chunked_loss import Head, Objective
from fastlm.ops.cross_entropy import TARGETS
from fastlm.ops.sparse_cross_entropy import sparse_cross_entropy

NAME = "distilled"  # the wrapper, its section, and the teachers among a task's constants
WHERE = f"config.{NAME}"
PREFIX = f"{NAME}/"  # of what is summed for its metrics
OWN = "cross_entropy"  # the task's own loss among the terms
CACHED = "cached_kl"  # the term that reads a teacher's sparse targets from disk (`data.targets`)
SPARSE = ("target_ids", "target_weights", "target_entropy")
TEACHERS = "teachers"
TRUE = "true"
BINS = 10


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a term that compares distributions; numbers or schedules."""

    temperature: float | str = 1.0


@dataclasses.dataclass(frozen=True)
class SymmetricOptions(Options):
    """`forward`: share of KL(p | q)."""

    forward: float | str = 0.5


@dataclasses.dataclass(frozen=True)
class JensenShannonOptions(Options):
    """`beta`: 0 is forward, 1 reverse KL."""

    beta: float | str = 0.5


@dataclasses.dataclass(frozen=True)
class SkewOptions(Options):
    """`alpha`: how much of itself the first distribution finds in the mixture."""

    alpha: float | str = 0.1


DIVERGENCES: dict[str, tuple[Callable[..., Array], type[Options]]] = {
    "forward_kl": (divergences.forward_kl, Options),
    "reverse_kl": (divergences.reverse_kl, Options),
    "symmetric_kl": (divergences.symmetric_kl, SymmetricOptions),
    "jensen_shannon": (divergences.jensen_shannon, JensenShannonOptions),
    "skew_kl": (divergences.skew_kl, SkewOptions),
    "skew_reverse_kl": (divergences.skew_reverse_kl, SkewOptions),
}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The objective.

    It reads `shared` = {"weights": {term: weight}, "options": {term: {"temperature": ..., ...}}, "heads": what the
    teachers' heads read}, and of a piece "teachers", their hidden states, and "true", 1 where the targets are of the
    data (0 where the student wrote them), beside what the task's own objective reads.

    Attributes:
      own: the task's.
      terms: (name, divergence) of each term that compares distributions.
      heads: of the teachers.
      cached: whether there is a term "cached_kl": the cross-entropy with sparse targets less the teacher's entropy,
        at a temperature of 1. Where a batch has no such targets, in evaluation, it is left out.
      diagnoses: whether the scores have what evaluation reports.
    """

    own: Objective
    terms: tuple[tuple[str, Callable[..., Array]], ...]
    heads: tuple[Head, ...]
    cached: bool = False
    diagnoses: bool = False

    def __call__(
        self, logits: Float[Array, "B c V"], shared: Any, piece: Mapping[str, Any]
    ) -> tuple[Float[Array, "B c"], dict[str, Any]]:
        """Returns (the weighted sum, scores: the task's own, each term's, and the diagnoses)."""
        loss, own = self.own(logits, (), piece)
        loss = loss * piece[TRUE]
        taught = self._teacher_logits(shared, piece, logits.shape[-1])
        more, terms = self._distances(logits, taught, shared, piece)
        scores = {"own": own, "terms": terms | {OWN: loss}}
        if self.diagnoses and taught:
            scores |= diagnoses(logits[..., : taught[0].shape[-1]], _mean(taught, 1.0), piece[TARGETS])
        return shared["weights"][OWN] * loss + more, scores

    def with_gradient(
        self, logits: Array, shared: Any, piece: Mapping[str, Any]
    ) -> tuple[Array, dict[str, Any], Array]:
        """Returns the same and the gradient by the student's logits."""
        loss, own, gradient = self.own.with_gradient(logits, (), piece)
        loss, gradient = loss * piece[TRUE], gradient * piece[TRUE][..., None]
        taught = self._teacher_logits(shared, piece, logits.shape[-1])

        def summed(logits: Array) -> tuple[Array, Any]:
            more, terms = self._distances(logits, taught, shared, piece)
            return jnp.sum(more), (more, terms)

        towards, (more, terms) = jax.grad(summed, has_aux=True)(logits)
        weight = shared["weights"][OWN]
        return weight * loss + more, {"own": own, "terms": terms | {OWN: loss}}, weight * gradient + towards

    def _teacher_logits(self, shared: Any, piece: Mapping[str, Any], most: int) -> list[Array]:
        """Returns each teacher's logits, cut to what all have in common with the student."""
        found = [
            head(params, hidden).astype(jnp.float32)
            for head, params, hidden in zip(self.heads, shared["heads"], piece[TEACHERS], strict=True)
        ]
        size = min([most, *(logits.shape[-1] for logits in found)])
        return [logits[..., :size] for logits in found]

    def _distances(
        self, logits: Array, taught: list[Array], shared: Any, piece: Mapping[str, Any]
    ) -> tuple[Array, dict[str, Array]]:
        total, terms = jnp.zeros(logits.shape[:-1], jnp.float32), {}
        for name, divergence in self.terms:
            options = dict(shared["options"][name])
            temperature = options.pop("temperature")
            student = jax.nn.log_softmax(logits[..., : taught[0].shape[-1]] / temperature)
            terms[name] = temperature**2 * divergence(_mean(taught, temperature), student, **options)
            total += shared["weights"][name] * terms[name]
        if self.cached and SPARSE[0] in piece:
            ids, weights, entropy = (piece[name] for name in SPARSE)
            terms[CACHED] = sparse_cross_entropy(logits, ids, weights) - entropy
            total += shared["weights"][CACHED] * terms[CACHED]
        return total, terms


def _mean(taught: list[Array], temperature: Any) -> Float[Array, "... V"]:
    """Returns the logarithm of the mean of the teachers' probabilities."""
    logs = [jax.nn.log_softmax(logits / temperature) for logits in taught]
    if len(logs) == 1:
        return logs[0]
    return jax.nn.logsumexp(jnp.stack(logs), axis=0) - jnp.log(len(logs))


def diagnoses(logits: Array, teacher: Array, targets: Array) -> dict[str, Array]:
    """Returns what evaluation reports of each prediction, from logits and a teacher's log-probabilities [..., V]."""
    student = jax.nn.log_softmax(logits)
    best, taught_best = jnp.argmax(student, axis=-1), jnp.argmax(teacher, axis=-1)
    known = targets < logits.shape[-1]  # what is not among what both have in common
    nll = -jnp.take_along_axis(teacher, jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    return {
        "kl": divergences.forward_kl(teacher, student),
        "agreement": (best == taught_best).astype(jnp.float32),
        "teacher_nll": jnp.where(known, nll, 0.0),
        "calibration": _in_bins(jnp.exp(jnp.max(student, axis=-1)), best == targets),
        "teacher_calibration": _in_bins(jnp.exp(jnp.max(teacher, axis=-1)), taught_best == targets),
    }


def _in_bins(confidence: Array, right: Array) -> Float[Array, "... 3 bins"]:
    """Returns, in the bin of the confidence: 1, the confidence, whether it was right."""
    place = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)
    values = jnp.stack([jnp.ones_like(confidence), confidence, right.astype(jnp.float32)], axis=-1)
    return values[..., :, None] * jax.nn.one_hot(place, BINS)[..., None, :]


def calibration_error(bins: Float[Array, "3 bins"]) -> float:
    """Returns the expected calibration error of summed bins: how far confidence and accuracy are apart (0 to 1)."""
    count, confidence, right = bins
    return float(abs(confidence - right).sum() / max(float(count.sum()), 1.0))
