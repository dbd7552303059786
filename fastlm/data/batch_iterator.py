"""`BatchIterator`: this process's shards as one iterator, with an exact position and a thread that reads ahead.

Notable: the position is kept per shard and never per process, so a run may go on with more or fewer
processes. It carries the identity of the data it belongs to; going on with other data would silently
repeat or skip text, so that is an error which names what changed.
"""

import json
import weakref
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from fastlm.errors import UserError

Batch = dict[str, np.ndarray]


class BatchIterator:
    """An endless iterator over batches whose position can be saved and restored exactly."""

    def __init__(self, shards: Mapping[int, grain.IterDataset], identity: dict[str, Any], prefetch: int) -> None:
        """Joins the batches of this process's shards; `training_batches` makes them."""
        # Through JSON, as checkpoints go: tuples become lists before they are compared.
        self.identity = json.loads(json.dumps(identity))
        ahead = grain.experimental.ThreadPrefetchIterDataset(_JoinedShards(shards), prefetch_buffer_size=prefetch)
        # In a list, so that the end of the interpreter can let go of it before its modules are torn down.
        self._open = [iter(ahead)]
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Returns what the next batch needs, JSON-able, by shard number.

        The dicts of all processes together (their keys differ) restore on any number of processes.
        """
        positions = self._batches.get_state()
        return {shard: {"identity": self.identity, "position": position} for shard, position in positions.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a state of `get_state`: the next batch is the one that followed it.

        Raises:
          UserError: the state was saved with other data, or lacks one of this process's shards.
        """
        positions = {}
        for shard in self._batches.get_state():
            if shard not in state:
                raise UserError(
                    f"the saved data position has shards {', '.join(sorted(state))} but not {shard}: "
                    "the checkpoint lacks the part of a process, or was made with other shards"
                )
            self._check_identity(state[shard]["identity"])
            positions[shard] = state[shard]["position"]
        self._batches.set_state(positions)

    def close(self) -> None:
        """Stops the background thread; the iterator gives no more batches."""
        self._finalizer()

    @property
    def _batches(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("this BatchIterator was closed")
        return self._open[0]

    def _check_identity(self, saved: Mapping[str, Any]) -> None:
        for name, value in self.identity.items():
            if saved.get(name) != value:
                raise UserError(
                    f"the saved data position is of other data: {name} was {saved.get(name)}, now it is {value}; "
                    f"set {name} back, or start from the weights with fresh data"
                )


def _close(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class _JoinedShards(grain.IterDataset):
    """The batches of several shards, each stacked in the order of shards."""

    def __init__(self, shards: Mapping[int, grain.IterDataset]) -> None:
        super().__init__()
        self._shards = shards

    def __iter__(self) -> "_JoinedShardsIterator":
        return _JoinedShardsIterator({number: iter(dataset) for number, dataset in self._shards.items()})


class _JoinedShardsIterator(grain.DatasetIterator):
    """Takes one batch of each shard at a time."""

    def __init__(self, shards: dict[int, grain.DatasetIterator]) -> None:
        super().__init__(list(shards.values()))
        self._shards = shards

    def __next__(self) -> Batch:
        parts = [next(shard) for shard in self._shards.values()]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {str(number): shard.get_state() for number, shard in self._shards.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, shard in self._shards.items():
            shard.set_state(state[str(number)])
