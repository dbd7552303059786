"""A teacher's targets from disk, in its place: made once (`experiments.teacher_targets`), read by every student.

Notable: what a row of the cache is of is decided by what the teacher read, so only tasks whose batches are final when
they leave the host can have one: language models. The store checks the teacher, the tokenizer, the data and each row
(`data.targets`).
Left out: targets of masked words, which are hidden anew on the device at every step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fastlm.compress.setting import Setting
from fastlm.compress.teachers import Teacher
from fastlm.data import targets
from fastlm.data.targets import manifest
from fastlm.errors import UserError
from fastlm.ops.chunked_loss import chunked_loss
from fastlm.ops.cross_entropy import TARGETS
from fastlm.ops.sparse_targets import Method, SparseTargets, row_uniforms
from fastlm.parallel import multihost
from fastlm.tasks.language_modeling import LanguageModeling


def check_task(setting: Setting, where: str) -> None:
    """Raises a `UserError` for a task whose batches a cache cannot be of."""
    if not isinstance(setting.kind, LanguageModeling):
        raise UserError(
            f"{where}: only language models learn from cached targets; let the teacher stay, without a cache"
        )


def joining(setting: Setting, folder: str, fingerprints: Mapping[str, str], where: str) -> Callable[[Any], Any]:
    """Returns the `Task.join` that adds targets to batches.

    Args:
      fingerprints: of the teachers that the config names, by name; none if it leaves that to the cache.

    Raises:
      UserError: there is no cache, or it is of another teacher or tokenizer.
    """
    check_task(setting, where)
    found = manifest.load(folder).key
    if fingerprints and found.teacher not in fingerprints.values():
        raise UserError(
            f"{where}: {folder} holds targets of another teacher than {' and '.join(fingerprints)} is today; write "
            "them anew in another folder, or leave config.distilled.teachers empty to take whose they are"
        )
    if found.vocab_size > setting.model.cfg.vocab_size:
        raise UserError(
            f"{where}: {folder} holds targets over {found.vocab_size} tokens, the student has "
            f"{setting.model.cfg.vocab_size}; set config.model.vocab_size to as many"
        )

    def join(batches: Any) -> Any:
        key = dataclasses.replace(found, tokenizer=setting.tokenizer.fingerprint, data=batches.identity)
        store = targets.Store(folder, key, steps=setting.steps)
        return targets.WithTargets(batches, store, **multihost.this_process())

    return join


@dataclasses.dataclass(frozen=True)
class Keeping:
    """The objective that only keeps what a method takes of a teacher's logits over `vocab_size`; the loss is 0."""

    method: Method
    vocab_size: int

    def __call__(self, logits: Array, shared: Any, piece: Mapping[str, Array]) -> tuple[Array, SparseTargets]:
        """Returns (zeros, targets) of each prediction."""
        del shared
        kept = self.method(logits[..., : self.vocab_size], piece["uniforms"], piece[TARGETS])
        return jnp.zeros(logits.shape[:-1], jnp.float32), kept


def teaching(
    teacher: Teacher, method: Method, seed: int, vocab_size: int
) -> Callable[[dict[str, Array]], SparseTargets]:
    """Returns `(batch with "row" [B], rows' numbers) -> targets of its tokens`, compiled; logits exist in chunks."""
    predictions, constants = teacher.task.predictions, teacher.constants

    @jax.jit
    def teach(constants: Any, batch: dict[str, Array]) -> SparseTargets:
        weights, rest = constants["weights"], {name: value for name, value in batch.items() if name != "row"}
        read = predictions.read(weights, constants["task"], teacher.task.carry(len(batch["row"])), rest, None, ())
        uniforms = row_uniforms(method, seed, batch["row"], read.hidden.shape[1])
        pieces, params = read.pieces | {"uniforms": uniforms}, predictions.head_params(weights)
        return chunked_loss(
            Keeping(method, vocab_size), predictions.head, params, read.hidden, (), pieces, chunk=predictions.chunk
        )[1]

    return lambda batch: teach(constants, batch)
