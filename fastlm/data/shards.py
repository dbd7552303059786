"""Virtual shards: what each of them reads, and how many there are.

Notable: shard s owns records s, s + S, s + 2S ... of every source, shuffles and packs them on its own,
and yields its rows of every batch. So the global batch is the same however shards are spread over processes.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import grain
import numpy as np

from fastlm.data.mixing import MixedRows
from fastlm.data.packing import PackedRows
from fastlm.data.records import ShuffledRecords
from fastlm.data.streaming import Source, StreamRows
from fastlm.data.tokenized import TokenizedDocuments
from fastlm.errors import UserError

_MOST_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the datasets of all shards share; `rows` is rows per shard and batch."""

    documents: Sequence[TokenizedDocuments]
    weights: Sequence[float]
    shards: int
    rows: int
    length: int
    pad: int
    packing: str
    seed: int

    def sources(self, shard: int) -> list[Source]:
        """Returns each source's share of the shard, its records shuffled anew in each epoch."""
        lengths = [len(documents) for documents in self.documents]
        firsts = itertools.accumulate(lengths, initial=0)
        return [
            Source(documents, self._records(number, shard), weight, first)
            for number, (documents, weight, first) in enumerate(zip(self.documents, self.weights, firsts))
        ]

    def _records(self, source: int, shard: int) -> ShuffledRecords:
        total = len(self.documents[source])
        return ShuffledRecords(total, first=shard, step=self.shards, seed=self.derived_seed(source, shard))

    def derived_seed(self, source: int, shard: int) -> int:
        """Returns a 32-bit seed of its own for one source in one shard."""
        return int(np.random.SeedSequence((self.seed, source, shard)).generate_state(1)[0])


def _packed_shard(recipe: Recipe, shard: int) -> grain.IterDataset:
    parts = [
        PackedRows(
            source.documents,
            source.records,
            length=recipe.length,
            pad=recipe.pad,
            packing=recipe.packing,
            seed=recipe.derived_seed(number, shard),
            first_record=source.first_record,
        )
        for number, source in enumerate(recipe.sources(shard))
    ]
    # Rows, not documents, are mixed: all rows are T long, so shares of rows are shares of tokens.
    mixed = MixedRows(parts, recipe.weights, shard=shard, shards=recipe.shards, rows=recipe.rows)
    return mixed.batch(recipe.rows)


def _stream_shard(recipe: Recipe, shard: int) -> grain.IterDataset:
    return StreamRows(recipe.sources(shard), lanes=recipe.rows, length=recipe.length, pad=recipe.pad)


MODES = {"packed": _packed_shard, "stream": _stream_shard}


def choose_shards(shards: int, batch_size: int, process_count: int, documents: Sequence[TokenizedDocuments]) -> int:
    """Returns the number of virtual shards, checked; 0 asks for a fitting power of two up to 8.

    Raises:
      UserError: shards, rows, processes and documents do not divide or suffice.
    """
    fewest = min(documents, key=len)
    if not shards:
        shards = _MOST_SHARDS
        while batch_size % shards or shards > len(fewest):
            shards //= 2
    if batch_size % shards:
        raise UserError(f"batch_size {batch_size} is no multiple of shards {shards}: change one of them")
    if shards % process_count:
        raise UserError(
            f"shards {shards} is no multiple of the {process_count} processes: set shards to one that divides "
            f"batch_size {batch_size} and is at most the {len(fewest)} document(s) of {fewest.name}"
        )
    if shards > len(fewest):
        raise UserError(
            f"{fewest.name} has {len(fewest)} document(s) for {shards} shards: use fewer shards (0 chooses)"
        )
    return shards
