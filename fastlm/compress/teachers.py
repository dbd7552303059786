"""Models that are learned from: loaded beside a student, frozen, read on the student's own batches.

Notable: a teacher is the student's task around another model, so what it says lines up with the student by place.
Its weights are constants of the task: passed to the step as an argument, cut over the mesh like any model's,
never differentiated, and known to checkpoints by a fingerprint. They may be kept in eight bits.
A teacher with another tokenizer is loaded as if the run had its (`across_tokenizers`).
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fastlm import tasks
from fastlm.compress.setting import Checkpoint, Setting
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig, abstract, rounding
from fastlm.ops import paths
from fastlm.parallel import memory, rules
from fastlm.tasks.task import Task

WEIGHTS = ("", "int8")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One of them, ready to be read.

    Attributes:
      name: its workdir and step.
      task: the student's task around `model`.
      constants: what its functions take: {"weights": {"model": ...}, "task": constants of the task}.
      fingerprint: of its weights.
    """

    name: str
    model: Model
    task: Task
    constants: dict[str, Any]
    fingerprint: str

    @property
    def cfg(self) -> ModelConfig:
        """Its architecture."""
        return self.model.cfg


def load(setting: Setting, workdir: str, step: str, dtype: str, weights: str) -> Teacher:
    """Reads a teacher onto the mesh.

    Args:
      step: a number, "best", or "" for the newest.
      dtype: compute type; "" for the student's.
      weights: "" as they are, "int8" rounded to eight bits.

    Raises:
      UserError: it is not there, is of another task, reads other tokens, or does not fit in memory.
    """
    found = setting.checkpoint(workdir, step)
    where = f"config.distilled.teachers: {workdir}"
    check_comparable(setting, found, where)
    check_fits(found.cfg, setting.mesh, where)
    params = found.params(found.cfg, setting.mesh, 0)
    fingerprint = fingerprint_of(found.cfg, params)
    compute = dataclasses.replace(setting.model.compute, **({"dtype": dtype} if dtype else {}))
    model = Model(found.cfg, compute)
    task = setting.kind.make(model, setting.tokenizer)
    constants = {
        "weights": {"model": rounding.round_weights(params) if weights else params},
        "task": task.constants,
    }
    return Teacher(f"{workdir}, step {found.step}", model, task, constants, fingerprint)


def check_comparable(setting: Setting, teacher: Checkpoint, where: str) -> None:
    """Checks that a teacher answers the student's question about the same tokens.

    Raises:
      UserError: says what differs, and what to do.
    """
    kind, student = tasks.make_kind(teacher.task), setting.model.cfg
    difference = setting.kind.difference(kind)
    if difference:
        raise UserError(f"{where} was trained for something else: {difference}")
    if teacher.cfg.family != student.family or teacher.cfg.head != student.head:
        raise UserError(
            f"{where} is of family '{teacher.cfg.family}' with head '{teacher.cfg.head}', the student of family "
            f"'{student.family}' with head '{student.head}'; they must be alike"
        )
    if teacher.tokenizer.to_json() != setting.tokenizer.to_json():
        raise UserError(
            f"{where} has another tokenizer ({teacher.tokenizer.vocab_size} tokens, the student's "
            f"{setting.tokenizer.vocab_size}), so its places and words are others; give the student the teacher's: "
            f"--config.tokenizer.kind=checkpoint --config.tokenizer.path={where.rpartition(' ')[2]}, or a language "
            "model terms that compare spans: config.distilled.terms=(('cross_entropy', 0.5), ('span_likelihood', 0.5))"
        )
    if setting.length > teacher.cfg.max_length:
        raise UserError(
            f"{where} reads at most {teacher.cfg.max_length} tokens, rows have config.data.length={setting.length}; "
            "lower it"
        )
    if bool(teacher.cfg.token_types) != bool(student.token_types):
        raise UserError(f"{where} has {teacher.cfg.token_types} token types, the student {student.token_types}")


def check_fits(cfg: ModelConfig, mesh: Mesh, where: str) -> None:
    """Raises a `UserError` that says how much memory is missing, where weights have not enough on a device."""
    shapes, axes = abstract(cfg)
    placed = rules.shardings(shapes, axes, mesh)
    sizes = jax.tree.map(lambda s, to: int(np.prod(to.shard_shape(s.shape))) * s.dtype.itemsize, shapes, placed)
    needed, free = sum(jax.tree.leaves(sizes)), memory.free_bytes()
    if jax.default_backend() == "cpu":  # all devices of a host share its memory
        needed *= len(mesh.local_devices)
    if free is not None and needed > free:
        raise UserError(
            f"{where} needs {needed / GIB:.2f} GiB of memory and {free / GIB:.2f} GiB are free, "
            f"{(needed - free) / GIB:.2f} GiB too few; cut it over more devices (config.mesh.fsdp, "
            "config.mesh.tensor), take a smaller teacher, or its targets from disk (experiments.teacher_targets, "
            "written where it fits)"
        )


def fingerprint_of(cfg: ModelConfig, params: Any) -> str:
    """Returns a hex digest of an architecture and its weights, the same however they are placed."""
    sums = jax.jit(lambda params: jax.tree.map(_checksum, params))(params)
    digest = hashlib.blake2b(cfg.to_json().encode(), digest_size=16)
    for path, value in sorted(paths.flatten(jax.device_get(sums)).items()):
        digest.update(f"{path} {int(value)}\n".encode())
    return digest.hexdigest()


def _checksum(leaf: jax.Array) -> jax.Array:
    """A sum of integers, which does not depend on their order, as one of floats would."""
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
    places = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
    return jnp.sum(bits * (places * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32)
