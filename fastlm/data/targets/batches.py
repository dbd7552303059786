"""`WithTargets`: the batches of a run with a teacher's cached targets.

Notable: it has the interface of a `BatchIterator`, and its position is that iterator's with the number of batches
beside it, by shard, so a run may go on with more or fewer processes. Each row is compared with the hashes
of the row that the teacher read: targets of another view of the same text are worse than none (arXiv 2106.05237).
Reading, unpacking and comparing are done by a thread that works ahead.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from fastlm.data.batch_iterator import Batch, BatchIterator
from fastlm.data.targets import manifest as manifests
from fastlm.data.targets.records import NAMES, hash_rows, view_of
from fastlm.data.targets.store import Store
from fastlm.errors import UserError

_STATE = "targets"


class WithTargets:
    """An endless iterator over batches with `target_ids` and the others of `records.NAMES`."""

    def __init__(
        self,
        batches: BatchIterator,
        store: Store,
        *,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ) -> None:
        """Joins them.

        Args:
          batches: this process's rows of the training batches, at their beginning; closed with this iterator.
          store: targets of this stream.
          process_index: this process.
          process_count: of so many.
          prefetch: batches made ahead by a background thread; 0 for none.

        Raises:
          UserError: the targets are of other batches.
        """
        self._key = store.manifest.key
        manifests.check_data(store.folder, self._key, batches.identity)
        self.identity = batches.identity | {_STATE: self._key.fingerprint}
        joined = _Joined(batches, store, process_index, process_count, self._key.fingerprint)
        ahead = grain.experimental.ThreadPrefetchIterDataset(joined, prefetch_buffer_size=prefetch)
        # In a list, so that the end of the interpreter can let go of it before its modules are torn down.
        self._open = [iter(ahead)]
        self._finalizer = weakref.finalize(self, _close, self._open, batches, store)

    def __iter__(self) -> "WithTargets":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Returns what the next batch needs, JSON-able, by shard number, as `BatchIterator.get_state` does."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a state of `get_state`.

        Raises:
          UserError: it was saved without targets, with others, or with other data.
        """
        self._batches.set_state(state)

    def close(self) -> None:
        """Stops the background thread and closes batches and files."""
        self._finalizer()

    @property
    def _batches(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("this WithTargets was closed")
        return self._open[0]


def _close(iterators: list[grain.DatasetIterator], batches: BatchIterator, store: Store) -> None:
    while iterators:
        iterators.pop().close()
    batches.close()
    store.close()


class _Joined(grain.IterDataset):
    """Batches with their targets, as Grain can read ahead."""

    def __init__(self, batches: BatchIterator, store: Store, index: int, count: int, fingerprint: str) -> None:
        super().__init__()
        self.batches, self.store, self.fingerprint = batches, store, fingerprint
        rows = store.manifest.key.batch_size // count
        self.first, self.rows = index * rows, rows

    def __iter__(self) -> "_JoinedIterator":
        return _JoinedIterator(self)


class _JoinedIterator(grain.DatasetIterator):
    """Counts batches, reads the targets of each, compares hashes."""

    def __init__(self, joined: _Joined) -> None:
        super().__init__()
        self._joined = joined
        self._step = 0

    def __next__(self) -> Batch:
        joined, store = self._joined, self._joined.store
        batch = next(joined.batches)
        first = self._step * store.manifest.key.batch_size + joined.first
        numbers = range(first, first + joined.rows)
        hashes, rows = store.get(numbers)
        self._check_view(batch, hashes)
        self._step += 1
        return batch | {name: np.stack([row[name] for row in rows]) for name in NAMES}

    def get_state(self) -> dict[str, Any]:
        own = {_STATE: {"of": self._joined.fingerprint, "step": self._step}}
        return {shard: entry | own for shard, entry in self._joined.batches.get_state().items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        folder = self._joined.store.folder
        saved = [entry.get(_STATE) for entry in state.values()]
        if None in saved:
            raise UserError(
                f"{folder}: the saved data position is of a run without cached targets; use another --workdir, or go "
                "on without them"
            )
        if any(entry["of"] != self._joined.fingerprint for entry in saved):
            raise UserError(f"{folder}: the saved data position is of a run with other cached targets; set them back")
        self._joined.batches.set_state(state)
        self._step = saved[0]["step"]

    def _check_view(self, batch: Batch, hashes: np.ndarray) -> None:
        store = self._joined.store
        manifests.check_view(store.folder, store.manifest.view, view_of(batch))
        same = hash_rows(batch, store.manifest.view) == hashes
        if not same.all():
            row = int(np.argmin(same.all(axis=1)))
            differing = ", ".join(name for name, equal in zip(store.manifest.view, same[row]) if not equal)
            raise UserError(
                f"{store.folder}: the cached targets of row {self._joined.first + row} of step {self._step} are of "
                f"another view of the data ({differing} differ); write targets anew with this version and these "
                "settings, in another folder"
            )
