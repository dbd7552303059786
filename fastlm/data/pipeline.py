"""The training pipeline: sources, tokens, rows, shards, batches; deterministic and resumable.

Notable: the global batch does not depend on how many processes there are. Work is divided into virtual
shards: shard s owns records s, s + S, s + 2S ... of each source and yields batch_size / S rows of every batch. A
process owns a range of shards and yields their rows, in order. State is kept per shard, so a
checkpoint restores on another number of processes. All of it is Grain datasets and iterators, ours for rows
(packing.py, streaming.py), mixtures and shards, Grain's for batches and reading ahead.
Left out: worker processes. Sources up to 256 MiB are tokenized once and cached, and then give millions of
tokens/s; larger ones (c4, wiki40b) are tokenized on the way by one thread, at 0.2 to 0.5 million tokens/s:
enough for a CPU or one small accelerator, too slow for a pod.
"""

import os
from collections.abc import Sequence

from fastlm.data.batch_iterator import Batch, BatchIterator
from fastlm.data.evaluation import evaluation_batches
from fastlm.data.packing import PACKINGS
from fastlm.data.shards import MODES, Recipe, choose_shards
from fastlm.data.sources import Sources, weighted_sources
from fastlm.data.tokenized import open_sources
from fastlm.data.tokenizers import Tokenizer
from fastlm.errors import UserError, nearest

__all__ = ["Batch", "BatchIterator", "evaluation_batches", "training_batches"]


def training_batches(
    sources: Sources,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    length: int,
    batch_size: int,
    mode: str = "packed",
    packing: str = "concat",
    shards: int = 0,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    data_dir: str | os.PathLike[str] | None = None,
    prefetch: int = 2,
) -> "BatchIterator":
    """Returns an endless iterator over this process's rows of the training batches.

    Args:
      sources: A source spec, or pairs (spec, share of the tokens).
      tokenizer: What gives ids.
      split: Split of every source, with an optional slice.
      length: T, tokens in a row.
      batch_size: B, rows in a global batch, over all processes.
      mode: ``packed`` or ``stream``.
      packing: ``concat`` or ``first_fit``, for packed rows.
      shards: Virtual shards; 0 for the largest power of two up to 8 that divides B and leaves none empty.
      seed: Of all shuffling, at least 0.
      process_index: This process.
      process_count: Of so many; must divide the number of shards.
      data_dir: Where prepared data and caches lie.
      prefetch: Batches made ahead by a background thread; 0 for none.

    Returns:
      An iterator of dicts of [B / process_count, T] arrays: `tokens`, `targets`, `segment_ids`, `positions`,
      `document` int32, `loss_mask` float32; in stream mode also `reset` [B / process_count] bool.

    Raises:
      UserError: an unknown source, split, mode or packing; shares, shards or sizes that do not fit.
    """
    _check_choice("mode", mode, tuple(MODES))
    _check_choice("packing", packing, tuple(PACKINGS))
    _check_at_least(1, length=length, batch_size=batch_size, process_count=process_count)
    _check_at_least(0, shards=shards, seed=seed, prefetch=prefetch)
    weighted = weighted_sources(sources)
    documents = open_sources(weighted, tokenizer, split, data_dir)
    shards = choose_shards(shards, batch_size, process_count, documents)
    recipe = Recipe(
        documents=documents,
        weights=tuple(weight for _, weight in weighted),
        shards=shards,
        rows=batch_size // shards,
        length=length,
        pad=tokenizer.pad,
        packing=packing,
        seed=seed,
    )
    per_process = shards // process_count
    owned = range(process_index * per_process, (process_index + 1) * per_process)
    identity = {
        "sources": [[spec, weight] for spec, weight in weighted],
        "split": split,
        "documents": [source.fingerprint for source in documents],
        "tokenizer": tokenizer.fingerprint,
        "length": length,
        "batch_size": batch_size,
        "mode": mode,
        "packing": packing if mode == "packed" else "",
        "shards": shards,
        "seed": seed,
    }
    return BatchIterator({shard: MODES[mode](recipe, shard) for shard in owned}, identity, prefetch)


def _check_choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise UserError(f"unknown {name} '{value}'{nearest(value, valid)} (one of: {', '.join(valid)})")


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
