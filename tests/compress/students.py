"""Small students and teachers of every task, their batches, and teachers' checkpoints in memory."""

import dataclasses

import jax
import numpy as np
import optax

from fastlm import tasks
from fastlm.compress.distill import Distilled
from fastlm.compress.setting import Setting
from fastlm.data.tokenizers.byte_level import ByteTokenizer
from fastlm.models import Compute, Model, ModelConfig, abstract
from fastlm.parallel import mesh as meshes
from fastlm.parallel import rules
from fastlm.training import precision, state
from fastlm.training.step import make_train_step

VOCAB, LENGTH, ROWS = ByteTokenizer().vocab_size, 16, 4
SMALL = ModelConfig(vocab_size=VOCAB, max_length=LENGTH, layers=2, width=16, heads=2)
LARGE = dataclasses.replace(SMALL, layers=4, width=24)
KINDS = {
    "language_modeling": {},
    "masked_language_modeling": {"family": "encoder", "head": "masked_language_model"},
    "classification": {"family": "encoder", "head": "sequence", "classes": 3, "pooling": "mean"},
    "question_answering": {"family": "encoder", "head": "tokens", "classes": 2},
    "sequence_to_sequence": {"family": "encoder_decoder", "encoder_layers": 2},
}


@dataclasses.dataclass
class Stored:
    """A checkpoint in memory."""

    cfg: ModelConfig
    task: dict
    seed: int = 1
    step: int = 7
    tokenizer: ByteTokenizer = dataclasses.field(default_factory=ByteTokenizer)

    def params(self, cfg, mesh, seed):
        assert cfg == self.cfg
        shapes, axes = abstract(cfg)
        placed = rules.shardings(shapes, axes, mesh)
        return jax.jit(Model(cfg).init, out_shardings=placed)(jax.random.key(self.seed))


def of(name, cfg):
    """(configuration of a task, architecture for it)"""
    more = {"labels": ("a", "b", "c")} if name == "classification" else {}
    cfg = dataclasses.replace(cfg, **KINDS[name])
    if cfg.encoder_layers:
        cfg = dataclasses.replace(cfg, encoder_layers=cfg.layers)
    return {"name": name, **more}, cfg


def setting(student=SMALL, name="language_modeling", steps=20, stored=None, **teacher):
    task, cfg = of(name, student)
    stored = stored or Stored(of(name, teacher.pop("cfg", LARGE))[1], task, **teacher)
    kind = tasks.make_kind(task)
    return Setting(
        Model(cfg, Compute(loss_chunk=32)),
        kind,
        ByteTokenizer(),
        meshes.make(),
        LENGTH,
        steps,
        lambda workdir, step: stored,
        start="runs/teacher",
    )


def batch(name="language_modeling", seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, (ROWS, LENGTH), dtype=np.int32)
    lengths = np.array([LENGTH, 9, 12, 16], np.int32)
    if name in ("language_modeling", "masked_language_modeling"):
        segments = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1).astype(np.int32)
        segments[1, 10:] = 0
        mask = (rng.random((ROWS, LENGTH)) < 0.7) * (segments > 0)
        mask[0] = 0  # a row that scores nothing
        starts = np.maximum.accumulate(
            np.where(np.diff(segments, axis=1, prepend=0) != 0, np.arange(LENGTH), 0), axis=1
        )
        return {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, 1),
            "loss_mask": mask.astype(np.float32),
            "segment_ids": segments,
            "positions": (np.arange(LENGTH) - starts).astype(np.int32),
        }
    found = {"tokens": tokens, "tokens_length": lengths, "row_mask": np.array([1, 1, 1, 0], np.float32)}
    if name == "classification":
        return found | {"label": rng.integers(0, 3, ROWS).astype(np.int32)}
    if name == "question_answering":
        places = {"context_first": 3, "context_stop": 8, "answer_first": 4, "answer_last": 5}
        return found | {key: np.full(ROWS, place, np.int32) for key, place in places.items()}
    return found | {
        "source": rng.integers(1, 200, (ROWS, 8), dtype=np.int32),
        "source_length": np.array([8, 5, 6, 8], np.int32),
        "targets": np.roll(tokens, -1, 1),
    }


def wrapped(about, **options):
    plain = about.kind.make(about.model, about.tokenizer)
    return Distilled(teachers=("runs/teacher",), **options)(plain, about)


def trained(task, model, steps=20, accumulation=1, optimizer=None):
    optimizer = optimizer or optax.adam(1e-2)
    scale = precision.loss_scale_for("float32")
    current = state.create(task, model, optimizer, seed=0, rows=ROWS, average=False, loss_scale=scale)
    step, metrics = jax.jit(make_train_step(task, optimizer, accumulation=accumulation)), {}
    for number in range(steps):
        current, metrics = step(current, task.constants, batch(seed=number))
    return current, metrics
