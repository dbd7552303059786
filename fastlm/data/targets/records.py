"""One row's targets as bytes, and back.

Notable: slots that are not in use take no room. Ids of a token are sorted, which loses nothing (their order says
nothing) and leaves small differences, kept instead of them; counts of draws are whole numbers of eight bits; other
numbers are float16. Numbers are laid out by significance, all low bytes, then all high ones: high bytes of differences
are nearly all alike, as counts are, and zstd, which array_record runs over each record, does the rest.
Of SmolLM2-135M (49,152 tokens) on the State of the Union, 50 draws are 21 different ids, and a token takes 45 bytes,
where 3 bytes an id and 7 beside would be 71, logits in float16 98,304, and the 50 likeliest 155; with t = 0.8, whose
weights are fractions, it takes 107. Left out: entropy coding of our own.

A record: T and the number of slots in use (uint32 each), a hash for each array of the view (uint64), then slots in use
of each token, ids, weights, entropy, log-probability, likeliest token.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from fastlm.ops.sparse_targets import Method, Sampled

Row = dict[str, np.ndarray]
NAMES = ("target_ids", "target_weights", "target_entropy", "target_best", "target_log_probability")
"""Arrays of a batch of targets: [B, T, K] int32 and float32; [B, T] float32, int32, float32."""

NOT_SEEN = ("document", "record", "epoch")
"""Arrays of a batch that say where rows come from; a teacher does not read them."""


class Codec:
    """Rows of targets of one method and vocabulary as bytes."""

    def __init__(self, method: Method, vocab_size: int, hashes: int) -> None:
        """Takes how many hashes stand before each row."""
        self.slots, self.vocab_size, self.hashes = method.slots(vocab_size), vocab_size, hashes
        counted = isinstance(method, Sampled) and method.proposal_exponent == 1
        self._draws, self._factor = (method.draws, method.weight) if counted else (0, np.float32(1))
        self._id = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._used = np.dtype("<u1" if self.slots < 1 << 8 else "<u2")
        self._weight = np.dtype(("<u1" if self._draws < 1 << 8 else "<u2") if self._draws else "<f2")

    def encode(self, hashes: np.ndarray, row: Mapping[str, np.ndarray]) -> bytes:
        """Returns a row (of `NAMES`, without the batch axis) as bytes; `hashes` [n] uint64 come first."""
        weights = np.asarray(row["target_weights"])
        weights = np.rint(weights * self._draws) if self._draws else weights
        weights = weights.astype(self._weight)
        in_use = weights != 0  # after rounding: what became 0 is no longer there
        ids = np.where(in_use, row["target_ids"], np.iinfo(np.int32).max)
        order = np.argsort(ids, axis=-1, kind="stable")
        ids, weights, in_use = (np.take_along_axis(a, order, axis=-1) for a in (ids, weights, in_use))
        flat = ids[in_use].astype(self._id)
        head = np.array([len(ids), len(flat)], "<u4").tobytes() + hashes.astype("<u8").tobytes()
        return head + b"".join(
            _by_significance(a)
            for a in (
                in_use.sum(axis=-1).astype(self._used),
                np.diff(flat, prepend=flat.dtype.type(0)),  # wraps where a token's first id follows a larger one
                weights[in_use],
                np.asarray(row["target_entropy"]).astype("<f2"),
                np.asarray(row["target_log_probability"]).astype("<f2"),
                np.asarray(row["target_best"]).astype(self._id),
            )
        )

    def decode(self, record: bytes) -> tuple[np.ndarray, Row]:
        """Returns (hashes, row): ids rise over the slots in use, which come first.

        Raises:
          ValueError: these bytes are of something else.
        """
        length, used = np.frombuffer(record, "<u4", 2).tolist()
        hashes = np.frombuffer(record, "<u8", self.hashes, offset=8)
        rest = memoryview(record)[8 + 8 * self.hashes :]

        def take(count: int, dtype: np.dtype) -> np.ndarray:
            nonlocal rest
            size = count * dtype.itemsize
            planes, rest = np.frombuffer(rest[:size], np.uint8), rest[size:]
            return np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T).view(dtype)[:, 0]

        half = np.dtype("<f2")
        counts, steps, weights = take(length, self._used), take(used, self._id), take(used, self._weight)
        in_use = np.arange(self.slots) < counts[:, None]
        row = {
            "target_ids": np.zeros(in_use.shape, np.int32),
            "target_weights": np.zeros(in_use.shape, np.float32),
            "target_entropy": take(length, half).astype(np.float32),
            "target_log_probability": take(length, half).astype(np.float32),
            "target_best": take(length, self._id).astype(np.int32),
        }
        row["target_ids"][in_use] = np.cumsum(steps, dtype=self._id)
        row["target_weights"][in_use] = weights.astype(np.float32) * self._factor
        if rest:
            raise ValueError(f"{len(rest)} bytes too many")
        return hashes, {name: row[name] for name in NAMES}


def view_of(batch: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Returns the names of what a teacher may read of a batch, sorted."""
    return tuple(sorted(set(batch) - set(NOT_SEEN)))


def hash_rows(batch: Mapping[str, np.ndarray], view: Sequence[str]) -> np.ndarray:
    """Returns [rows, len(view)] uint64: a hash of each row of each array, with its type and shape."""
    columns = []
    for name in view:
        array = np.ascontiguousarray(batch[name])
        kind = f"{array.dtype.str} {array.shape[1:]}".encode()
        columns.append([_hash(kind + row.tobytes()) for row in array])
    return np.array(columns, np.uint64).T


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _by_significance(array: np.ndarray) -> bytes:
    return array.view(np.uint8).reshape(len(array), array.dtype.itemsize).T.tobytes()
