"""Stream mode: rows continue each other, documents come once an epoch, states are exact."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.records import ShuffledRecords
from fastlm.data.streaming import Source, StreamRows
from fastlm.data.tokenized import TokenizedDocuments
from fastlm.errors import UserError

STRIDE = 10_000


class Numbered(TokenizedDocuments):
    """Documents whose tokens are numbers of their own."""

    def __init__(self, lengths, first=0):
        self.name = "numbered"
        self._lengths, self._first = lengths, first

    def __len__(self):
        return len(self._lengths)

    def get(self, indices):
        return [np.arange(self._lengths[i], dtype=np.int32) + (self._first + i) * STRIDE for i in indices]


def source(lengths, weight=1.0, first=0, seed=0):
    records = ShuffledRecords(len(lengths), seed=seed)
    return Source(Numbered(lengths, first), records, weight, first)


def stream(lengths, *, lanes=2, length=8):
    return StreamRows([source(lengths)], lanes=lanes, length=length, pad=-7)


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda lengths: max(lengths) > 1)


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, lanes=st.integers(1, 4), length=st.integers(1, 12))
def test_rows_continue_each_other(lengths, lanes, length):
    iterator = iter(stream(lengths, lanes=lanes, length=length))
    batches = [next(iterator) for _ in range(12)]
    for lane in range(lanes):
        tokens = np.concatenate([batch["tokens"][lane] for batch in batches])
        targets = np.concatenate([batch["targets"][lane] for batch in batches])
        documents = np.concatenate([batch["document"][lane] for batch in batches])
        assert all(batch["loss_mask"][lane].all() for batch in batches)
        assert np.array_equal(targets, tokens + 1)
        assert np.array_equal(documents, tokens // STRIDE)
        # Inside a document tokens go on by one; a new one begins only after the last pair of the one before.
        lasts = np.array([lengths[document] for document in documents]) - 2
        for i in range(1, len(tokens)):
            if tokens[i - 1] % STRIDE == lasts[i - 1]:
                assert tokens[i] % STRIDE == 0
            else:
                assert tokens[i] == tokens[i - 1] + 1
        starts = np.array([batch["tokens"][lane][0] % STRIDE == 0 for batch in batches])
        assert np.array_equal(starts, [batch["reset"][lane] for batch in batches])


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 12))
def test_segments_and_positions(lengths, length):
    iterator = iter(stream(lengths, length=length))
    for _ in range(6):
        batch = next(iterator)
        for lane in range(2):
            row = {name: value[lane] for name, value in batch.items()}
            begins = (row["tokens"] % STRIDE == 0) | (np.arange(length) == 0)
            assert np.array_equal(row["segment_ids"], np.cumsum(begins))
            starts = np.maximum.accumulate(np.where(begins, np.arange(length), 0))
            assert np.array_equal(row["positions"], np.arange(length) - starts)


def test_every_document_once_an_epoch():
    lengths = [7, 12, 3, 30, 9, 5, 22]
    iterator = iter(stream(lengths, lanes=1, length=sum(lengths) - len(lengths)))
    for _ in range(3):  # a row is exactly one epoch
        assert sorted(set(next(iterator)["document"][0].tolist())) == list(range(7))


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, lanes=st.integers(1, 3), steps=st.integers(0, 25))
def test_state_restores_exactly(lengths, lanes, steps):
    dataset = stream(lengths, lanes=lanes, length=5)
    straight = iter(dataset)
    for _ in range(steps):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    restored = iter(dataset)
    restored.set_state(state)
    for _ in range(10):
        expected, got = next(straight), next(restored)
        assert all(np.array_equal(expected[name], got[name]) for name in expected)


def test_shares_count_tokens():
    sources = [source([500] * 5, 0.75), source([21] * 40, 0.25, first=5)]
    iterator = iter(StreamRows(sources, lanes=2, length=100, pad=0))
    documents = np.concatenate([next(iterator)["document"].ravel() for _ in range(400)])
    assert abs((documents < 5).mean() - 0.75) < 0.03


def test_a_shard_without_text_is_an_error_and_no_endless_loop():
    with pytest.raises(UserError, match="no text in the documents of this shard"):
        next(iter(stream([0, 1, 0])))
