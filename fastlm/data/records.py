"""Which records a shard reads, in another order each epoch.

Notable: Grain's `index_shuffle` needs no memory, which counts for C4's 365 million records, but walks a
domain of at least 65,536 (milliseconds per record for a shard of twenty), so small shards hold a permutation.
"""

import numpy as np
from grain.experimental import index_shuffle

_SMALL = 1 << 16


class ShuffledRecords:
    """Records first, first + step, ... below `total`; index e * len + i is the i-th of epoch e."""

    def __init__(self, total: int, *, first: int = 0, step: int = 1, seed: int = 0) -> None:
        """Defines the records and their order; `seed` has 32 bits."""
        self._records = range(first, total, step)
        self._seed = seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, len(self))
        if len(self) <= _SMALL:
            return self._records[self._permuted(epoch, position)]
        seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        return self._records[index_shuffle(position, max_index=len(self) - 1, seed=seed, rounds=4)]

    def _permuted(self, epoch: int, position: int) -> int:
        if self._epoch != epoch:
            self._permutation = np.random.default_rng((self._seed, epoch)).permutation(len(self))
            self._epoch = epoch
        return int(self._permutation[position])
