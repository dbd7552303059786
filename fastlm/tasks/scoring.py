"""Scoring a task on a split: sums over batches, or per document with a standard error.

Notable: sums are added in Python floats (float64) over batches, then a task's `summarize` turns
totals into metrics, so the result does not depend on how the split was batched.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fastlm.measurement import statistics
from fastlm.parallel import multihost
from fastlm.tasks.task import Task

HostBatch = dict[str, np.ndarray]
NOT_FOR_DEVICE = ("document", "record", "epoch")


def to_device(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the part of a host batch that the model reads, as global arrays."""
    return multihost.global_batch({k: v for k, v in batch.items() if k not in NOT_FOR_DEVICE}, mesh)


def evaluate(
    eval_step: Callable, task: Task, params: Any, compression: Any, step: Any, batches: Iterable[HostBatch], mesh: Mesh
) -> dict[str, float]:
    """Returns the task's metrics over all batches."""
    totals: dict[str, Any] = defaultdict(float)
    carry = None
    for batch in batches:
        batch = to_device(batch, mesh)
        if carry is None:
            carry = task.carry(next(iter(batch.values())).shape[0])
        carry, sums = eval_step(params, compression, task.constants, carry, batch, step)
        for name, value in jax.device_get(sums).items():
            totals[name] = totals[name] + np.asarray(value, np.float64)
    return task.summarize(dict(totals)) if totals else {}


def evaluate_documents(
    predict: Callable, task: Task, weights: Any, batches: Iterable[HostBatch], mesh: Mesh
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Returns the task's metrics, with the standard error over documents of bits_per_byte, or else of the loss.

    Beside them each document's sums, with its number, for comparing models document by document.

    Args:
      predict: jitted `task.predict`; returns per-token arrays [B, T] named like the task's sums.
      batches: with `document` [B, T], the number of each token's document, -1 for padding.

    The standard error is that of a ratio of sums (bits over bytes) over independent documents,
    by linearisation: documents count by their length, as they do in the ratio itself.
    """
    per_document: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    carry = None
    for batch in batches:
        on_device = to_device(batch, mesh)
        carry = task.carry(next(iter(on_device.values())).shape[0]) if carry is None else carry
        carry, scores = predict(weights, task.constants, carry, on_device)
        scores = jax.device_get(_gathered(scores))
        documents = gather_host(batch["document"])
        for number in np.unique(documents[documents >= 0]):
            here = documents == number
            for name, values in scores.items():
                per_document[int(number)][name] += float(np.sum(values[here], dtype=np.float64))
    sums = list(per_document.values())
    totals = {name: sum(s[name] for s in sums) for name in (sums[0] if sums else {})}
    metrics = task.summarize(totals) if totals else {}
    if len(sums) > 1 and "bytes" in totals:
        bits = [s["nll"] / math.log(2) for s in sums]
        metrics["bits_per_byte_error"] = statistics.ratio_of_sums(bits, [s["bytes"] for s in sums]).error
    elif len(sums) > 1:
        metrics["loss_error"] = statistics.ratio_of_sums([s["nll"] for s in sums], [s["tokens"] for s in sums]).error
    if len(sums) > 1:
        metrics["documents"] = float(len(sums))
    return metrics, [{"document": number, **of_one} for number, of_one in sorted(per_document.items())]


def _gathered(scores: dict[str, jax.Array]) -> dict[str, jax.Array]:
    if jax.process_count() == 1:
        return scores
    return {name: multihost_utils.process_allgather(value, tiled=True) for name, value in scores.items()}


def gather_host(rows: np.ndarray | jax.Array) -> np.ndarray:
    """Returns the rows of all processes."""
    if jax.process_count() == 1:
        return np.asarray(rows)
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))
