"""Distillation: a task learns from a teacher beside its own answers (Hinton et al., arXiv 1503.02531).

    config.wrappers = ("distilled",)
    config.distilled.teachers = ("runs/lm_reference",)
    config.distilled.terms = (("cross_entropy", 0.5), ("forward_kl(temperature=2.0)", 0.5))

Notable: a function `Task -> Task` for every task whose loss is made of `Predictions`. The loss is a sum of
named terms, each with a weight that may change while the run goes on: the task's own loss, distances from the
teacher's distribution (`mixture`), and what is inside (`features`). One term stands alone, in which each block learns
by itself (`blockwise`). The teacher reads the very batch that the student reads, behind masking and augmentation, so
both say something about the same places. A teacher with another tokenizer reads the same text, and is compared on spans
of it (`spans`, `across_tokenizers`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fastlm import configuration
from fastlm.compress import across_tokenizers, blockwise, cached, mixture, noise, on_policy, teachers
from fastlm.compress.across_tokenizers import AcrossTokenizers
from fastlm.compress.blockwise import BLOCKS
from fastlm.compress.features import Pairs
from fastlm.compress.mixture import (
    CACHED,
    NAME,
    OWN,
    PREFIX,
    SPARSE,
    WHERE,
    Mixture,
    calibration_error,
)
from fastlm.compress.noise import Noise, Noisy
from fastlm.compress.on_policy import WRITTEN, OnPolicy
from fastlm.compress.setting import Setting
from fastlm.compress.teachers import Teacher
from fastlm.compress.terms import Term, named, parsed
from fastlm.errors import UserError
from fastlm.ops.chunked_loss import MASK, chunked_loss
from fastlm.tasks.task import Read, Task


@dataclasses.dataclass(frozen=True)
class Distilled:
    """The wrapper "distilled".

    Attributes:
      teachers: workdirs of trained models; of several, the mean of their probabilities is learned (features are of the
        first).
      step: of their checkpoints: a number, "best", or "" for the newest.
      dtype: their compute type; "" for the student's.
      weights: "int8" keeps their matrices in eight bits; "" as they are.
      terms: pairs (term, weight). A term is a name with options: "cross_entropy" is the task's own loss, the others
        are in `mixture.DIVERGENCES` and `features.FEATURES`, or "cached_kl"; "blocks" stands alone; those in
        `spans.SPANS` are for a teacher with another tokenizer. Weights and temperatures are numbers or schedules,
        "cosine(start=0.9, end=0.5)".
      cache: folder of a teacher's targets for the term "cached_kl"; with no other term of a teacher it need not be
        loaded, and may be left out of `teachers`.
      on_policy: keys of `on_policy.OnPolicy`: how often the student writes what it learns from.
      noise: keys of `noise.Noise`: how many of the texts are changed before both read them.
      teacher_length: tokens of the rows of a teacher with another tokenizer; 0 for what the texts need.
    """

    teachers: tuple[str, ...] = ()
    step: str = ""
    dtype: str = ""
    weights: str = ""
    terms: tuple[tuple[str, float | str], ...] = ((OWN, 0.5), ("forward_kl(temperature=2.0)", 0.5))
    cache: str = ""
    on_policy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    noise: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher_length: int = 0

    def __post_init__(self) -> None:
        if not self.teachers and not self.cache:
            raise UserError(f"{WHERE}.teachers: nobody to learn from; give workdirs of trained models")
        if self.weights not in teachers.WEIGHTS:
            raise UserError(f"{WHERE}.weights: '{self.weights}' is neither 'int8' nor '' (as they are)")
        configuration.at_least(NAME, self, teacher_length=0)

    def __call__(self, task: Task, setting: Setting) -> Task:
        """Returns the task with the teachers' terms.

        Raises:
          UserError: a task without `Predictions`, an unknown term or option, teachers that cannot teach this student.
        """
        if task.predictions is None:
            raise UserError(f"config.wrappers: '{NAME}' needs a task that chooses between answers; this one does not")
        terms = named([parsed(spec, weight, setting.steps) for spec, weight in self.terms])
        how = configuration.make(OnPolicy, f"{NAME}.on_policy", self.on_policy)
        if any(term.spans is not None for term in terms):
            return self._across_tokenizers(task, setting, terms, how)
        self._check_alone(terms)
        loaded = [teachers.load(setting, w, self.step, self.dtype, self.weights) for w in self.teachers]
        origins = {teacher.name: teacher.fingerprint for teacher in loaded}
        if self.cache:
            task = dataclasses.replace(task, join=cached.joining(setting, self.cache, origins, f"{WHERE}.cache"))
        loaded = self._needed(terms, loaded)
        task = dataclasses.replace(task, origins=task.origins | origins)
        if terms[0].blocks is not None:
            return blockwise.wrapped(task, setting, loaded[0], terms[0].blocks, terms[0].weight)
        writer = on_policy.make(how, setting, f"{WHERE}.on_policy")
        key, what = "on_policy.share", "of what the student writes"
        if writer is None:
            key, what = "noise.rows", "of changed texts"
            with configuration.naming(f"{NAME}.noise"):
                noisy = configuration.make(Noise, f"{NAME}.noise", self.noise)
            writer = noise.make(noisy, setting, f"{WHERE}.noise")
        if writer and self.cache:
            raise UserError(f"{WHERE}.cache: knows nothing {what}; empty it, or set {WHERE}.{key} to 0")
        return _Wrapped(task, setting, terms, tuple(loaded), writer).task()

    def _across_tokenizers(self, task: Task, setting: Setting, terms: tuple[Term, ...], how: OnPolicy) -> Task:
        """Returns the task that learns from spans of text."""
        (spans, *_) = (term.name for term in terms if term.spans is not None)
        for term in terms:
            if term.spans is None and term.name != OWN:
                raise UserError(
                    f"{WHERE}.terms: '{term.name}' compares place by place, '{spans}' with a teacher whose tokens are "
                    "others; leave one of them out"
                )
        if self.cache or how.share != 0 or self.noise.get("rows"):
            live = "on_policy.share" if how.share != 0 else "noise.rows"
            key, value = ("cache", "empty it") if self.cache else (live, "set it to 0")
            raise UserError(f"{WHERE}.{key}: '{spans}' needs the teacher, and texts from the data; {value}")
        if len(self.teachers) != 1:
            raise UserError(f"{WHERE}.teachers: '{spans}' takes one teacher, got {len(self.teachers)}")
        (workdir,) = self.teachers
        reading = across_tokenizers.load(setting, workdir, self.step, self.dtype, self.weights, self.teacher_length)
        weighted = [
            across_tokenizers.Weighted(term.name, term.weight, term.spans, term.options.get("temperature"))
            for term in terms
        ]
        return AcrossTokenizers(task, setting, *reading, tuple(weighted)).task()

    def _check_alone(self, terms: tuple[Term, ...]) -> None:
        """Refuses to have blocks that learn by themselves learn anything else."""
        changed = self.on_policy.get("share") or self.noise.get("rows")
        more = len(self.terms) > 1 or len(self.teachers) != 1 or self.cache or changed
        if more and any(term.blocks is not None for term in terms):
            raise UserError(
                f"{WHERE}.terms: '{BLOCKS}' trains each block by itself: it takes one teacher, and no other term, "
                "cache, on_policy or noise; train end to end afterwards (experiments.linearize does both)"
            )

    def _needed(self, terms: tuple[Term, ...], loaded: list[Teacher]) -> list[Teacher]:
        """Returns the teachers that a term reads; with cached targets alone, none."""
        if self.cache and not any(term.name == CACHED for term in terms):
            raise UserError(f"{WHERE}.cache: no term reads it; add ('{CACHED}', weight) to {WHERE}.terms, or empty it")
        live = [term.name for term in terms if term.feature or term.blocks or term.divergence]
        if live and not loaded:
            raise UserError(f"{WHERE}.teachers: '{live[0]}' needs a live teacher; name one, or use '{CACHED}' alone")
        if not self.cache and any(term.name == CACHED for term in terms):
            raise UserError(f"{WHERE}.terms: '{CACHED}' needs {WHERE}.cache, a folder of experiments.teacher_targets")
        return loaded if live else []


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """A task, its terms and teachers, and the functions that they come to."""

    inner: Task
    setting: Setting
    terms: tuple[Term, ...]
    teachers: tuple[Teacher, ...]
    writer: on_policy.Writer | Noisy | None = None

    def task(self) -> Task:
        """Returns the task."""
        student = self.setting.model.cfg
        for term in self._features:
            with configuration.naming(f"{NAME}.terms: {term.name}"):
                term.feature.check(student, self.teachers[0].cfg)
        trained = jax.eval_shape(lambda: self._beside(jax.random.key(0)))
        axes = {f"{NAME}/{term}/{name}": ("embed", None) for term, leaves in trained.items() for name in leaves}
        constants = {**self.inner.constants, NAME: tuple(teacher.constants for teacher in self.teachers)}
        return dataclasses.replace(
            self.inner,
            init=self._init if trained else self.inner.init,
            prepare=self._prepare if self.writer else self.inner.prepare,
            loss=self._loss,
            summarize=self._summarize,
            predict=self._predict,
            carry=self._carry,
            remarks=self._remarks,
            constants=constants,
            axes=self.inner.axes | axes,
        )

    @property
    def _features(self) -> list[Term]:
        return [term for term in self.terms if term.feature is not None]

    def _beside(self, rng: jax.Array) -> dict[str, dict[str, jax.Array]]:
        """What is trained beside the model, by term."""
        made = {}
        for number, term in enumerate(self._features):
            key = jax.random.fold_in(rng, number)
            leaves = term.feature.init(key, self.setting.model.cfg, self.teachers[0].cfg)
            made |= {term.name: leaves} if leaves else {}
        return made

    def _init(self, rng: jax.Array, model_params: Any) -> Any:
        return {**self.inner.init(rng, model_params), NAME: self._beside(jax.random.fold_in(rng, 2))}

    def _carry(self, rows: int) -> Any:
        return self.inner.carry(rows), tuple(teacher.task.carry(rows) for teacher in self.teachers)

    def _prepare(self, weights, constants, batch, step, rng):
        keys = (None, None) if rng is None else jax.random.split(rng)
        return self.writer(weights, self.inner.prepare(weights, constants, batch, step, keys[0]), step, keys[1])

    def _loss(self, weights, constants, carry, batch, step, rng):
        captures = {name for term in self._features for name in term.feature.captures}
        predictions, (carry, theirs) = self.inner.predictions, carry
        read = predictions.read(weights, constants, carry, batch, rng, captures)
        taught = self._taught(constants, theirs, batch, captures)
        values = {term.name: (term.weight(step), {k: v(step) for k, v in term.options.items()}) for term in self.terms}
        shared = {
            "weights": {name: weight for name, (weight, _) in values.items()},
            "options": {name: options for name, (_, options) in values.items()},
            "heads": tuple(
                teacher.task.predictions.head_params(own["weights"])
                for teacher, own in zip(self.teachers, constants[NAME], strict=True)
            ),
        }
        pieces = {
            **read.pieces,
            mixture.TEACHERS: tuple(one.hidden for one in taught),
            mixture.TRUE: self._true(read, batch),
        } | {name: batch[name] for name in SPARSE if name in batch}
        objective, params = self._mixture(diagnoses=rng is None), predictions.head_params(weights)
        total, scores = chunked_loss(
            objective, predictions.head, params, read.hidden, shared, pieces, chunk=predictions.chunk
        )
        mask, true = read.pieces[MASK], pieces[mixture.TRUE]
        sums = predictions.sums(scores.pop("own"), read.pieces | {MASK: mask * true}, constants)
        terms = {name: jnp.sum(value * mask) for name, value in scores.pop("terms").items()}
        for term, distance in self._distances(weights, read, taught):
            terms[term.name] = jnp.sum(distance * jnp.sum(mask, axis=1))
            total += shared["weights"][term.name] * terms[term.name]
        count = jnp.sum(mask)
        sums |= {f"{PREFIX}term/{name}": value for name, value in terms.items()}
        sums |= {f"{PREFIX}weight/{name}": weight * count for name, weight in shared["weights"].items()}
        sums |= {f"{PREFIX}{name}": jnp.einsum("bp,bp...->...", mask, value) for name, value in scores.items()}
        carry = read.carry, tuple(one.carry for one in taught)
        return total, count, (carry, {"sums": sums | {f"{PREFIX}count": count}})

    def _taught(self, constants: Any, carries: Any, batch: Any, captures: set[str]) -> list[Read]:
        """What the teachers make of a batch; nothing of it is differentiated."""
        return [
            jax.lax.stop_gradient(
                teacher.task.predictions.read(own["weights"], own["task"], carry, batch, None, captures)
            )
            for teacher, own, carry in zip(self.teachers, constants[NAME], carries, strict=True)
        ]

    def _true(self, read: Read, batch: Any) -> jax.Array:
        """1 for predictions whose targets are of the data."""
        ones = jnp.ones_like(read.pieces[MASK])
        return ones - batch[WRITTEN][:, None] if WRITTEN in batch else ones

    def _mixture(self, *, diagnoses: bool) -> Mixture:
        distances = tuple((term.name, term.divergence) for term in self.terms if term.divergence is not None)
        heads = tuple(teacher.task.predictions.head for teacher in self.teachers)
        has_cache = any(term.name == CACHED for term in self.terms)
        return Mixture(self.inner.predictions.objective, distances, heads, has_cache, diagnoses)

    def _distances(self, weights: Any, student: Read, taught: list[Read]) -> list[tuple[Term, jax.Array]]:
        cfg, found = self.setting.model.cfg, []
        for term in self._features:
            params = weights.get(NAME, {}).get(term.name, {})
            pairs: Pairs = term.feature.pairs(cfg, self.teachers[0].cfg)
            causal = cfg.family != "encoder" and not term.feature.stack
            found.append((term, term.feature(params, student, taught[0], pairs, causal)))
        return found

    def _summarize(self, sums: dict[str, Any]) -> dict[str, float]:
        own = {name: value for name, value in sums.items() if not name.startswith(PREFIX)}
        ours = {name.removeprefix(PREFIX): value for name, value in sums.items() if name.startswith(PREFIX)}
        count = max(float(ours.pop("count", 0.0)), 1.0)
        metrics = self.inner.summarize(own)
        for name, value in ours.items():
            shown = name.replace("/", "_").replace("teacher_nll", "teacher_loss")
            metrics[shown] = calibration_error(value) if name.endswith("calibration") else float(value) / count
        return metrics

    def _predict(self, weights: Any, constants: Any, carry: Any, batch: Any) -> tuple[Any, Any]:
        own, theirs = carry if carry != () else ((), ())
        own, found = self.inner.predict(weights, constants, own, batch)
        return ((own, theirs) if carry != () else ()), found

    def _remarks(self, metrics: dict[str, float]) -> tuple[str, ...]:
        lines = self.inner.remarks(metrics)
        teacher, student = metrics.get("teacher_loss", -math.inf), metrics.get("loss", math.inf)
        if teacher > student:
            lines += (
                f"warning: the teacher is worse than the student here ({teacher:.4f} against {student:.4f} nats); "
                "give 'cross_entropy' more weight, or find a better teacher",
            )
        return lines
