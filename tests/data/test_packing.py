"""The laws of packed rows: nothing lost, nothing twice, nothing across documents; exact states."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import packing
from fastlm.data.records import ShuffledRecords
from fastlm.data.tokenized import TokenizedDocuments
from fastlm.errors import UserError

STRIDE = 10_000  # token `record * STRIDE + i` is the i-th of a record, so every token says where it is from


class Numbered(TokenizedDocuments):
    """Documents whose tokens are numbers of their own."""

    def __init__(self, lengths, block_tokens):
        self.name = "numbered"
        self.block_tokens = block_tokens
        self._lengths = lengths

    def __len__(self):
        return len(self._lengths)

    def get(self, indices):
        return [np.arange(self._lengths[i], dtype=np.int32) + i * STRIDE for i in indices]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Lets blocks end after a few documents, so that an epoch has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_READ_AT_ONCE", 2)
        yield


def rows_of(lengths, *, length, method, seed=0, block_tokens=50):
    documents = Numbered(lengths, block_tokens)
    records = ShuffledRecords(len(lengths), seed=seed)
    return packing.PackedRows(documents, records, length=length, pad=-7, packing=method, seed=seed)


def pairs_in(row):
    """The (input, target) pairs of the real part of a row."""
    real = row["loss_mask"] > 0
    return list(zip(row["tokens"][real].tolist(), row["targets"][real].tolist()))


def check_row(row, length):
    """Segments are contiguous pieces of one document, positions count from 0, the rest is padding."""
    assert all(row[name].shape == (length,) for name in row)
    segments = row["segment_ids"]
    real = segments > 0
    assert np.array_equal(real, row["loss_mask"] == 1.0)
    assert np.array_equal(~real, row["loss_mask"] == 0.0)
    count = int(real.sum())
    assert real[:count].all()  # padding only at the end
    assert (row["tokens"][count:] == -7).all() and (row["targets"][count:] == -7).all()
    assert (row["document"][count:] == -1).all() and (row["positions"][count:] == 0).all()
    assert sorted(set(segments[:count])) == list(range(1, segments.max() + 1))
    for segment in range(1, segments.max() + 1):
        where = np.flatnonzero(segments == segment)
        assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
        tokens = row["tokens"][where]
        assert np.array_equal(tokens, tokens[0] + np.arange(len(where)))
        assert np.array_equal(row["targets"][where], tokens + 1)
        assert np.array_equal(row["positions"][where], np.arange(len(where)))
        assert (row["document"][where] == tokens[0] // STRIDE).all()


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS, length=st.integers(1, 17), seed=st.integers(0, 99), method=st.sampled_from(["concat", "first_fit"])
)
def test_every_pair_once_an_epoch(lengths, length, seed, method):
    dataset = rows_of(lengths, length=length, method=method, seed=seed)
    iterator = iter(dataset)
    seen = Counter()
    while True:
        row = next(iterator)
        state = iterator.get_state()
        if state["epoch"] >= 3:
            break  # the first row of a later block: all blocks before it are out, but for what it carries
        check_row(row, length)
        seen.update(pairs_in(row))
        if method == "concat":
            assert row["loss_mask"].all()
    for record, start, stop in state["carry"]:
        seen.update((record * STRIDE + i, record * STRIDE + i + 1) for i in range(start, stop))
    epoch, count = state["epoch"], len(lengths)
    begun = {dataset.records[epoch * count + i] for i in range(state["cursor"])}
    assert seen == {
        (record * STRIDE + i, record * STRIDE + i + 1): epoch + (record in begun)
        for record, tokens in enumerate(lengths)
        for i in range(tokens - 1)
    }


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    length=st.integers(1, 17),
    steps=st.integers(0, 40),
    method=st.sampled_from(["concat", "first_fit"]),
)
def test_state_restores_exactly(lengths, length, steps, method):
    dataset = rows_of(lengths, length=length, method=method)
    straight = iter(dataset)
    for _ in range(steps):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    restored = iter(dataset)
    restored.set_state(state)
    for _ in range(12):
        expected, got = next(straight), next(restored)
        assert all(np.array_equal(expected[name], got[name]) for name in expected)
    assert restored.get_state() == straight.get_state()


@given(pairs=st.integers(0, 100), length=st.integers(1, 20), data=st.data())
def test_cut_covers_a_document_once(pairs, length, data):
    first = data.draw(st.integers(1, length))
    pieces = packing.cut(5, pairs, length, first)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(pairs))
    assert all(1 <= piece.length <= length for piece in pieces)
    if 0 < pairs <= length:
        assert len(pieces) == 1


@given(sizes=st.lists(st.integers(1, 10), max_size=40))
def test_first_fit_is_first_fit(sizes):
    pieces = [packing.Piece(i, 0, size) for i, size in enumerate(sizes)]
    rows = packing.first_fit(pieces, 10, []).rows
    # The definition, the slow way.
    expected: list[list[packing.Piece]] = []
    for piece in pieces:
        for row in expected:
            if sum(p.length for p in row) + piece.length <= 10:
                row.append(piece)
                break
        else:
            expected.append([piece])
    assert rows == expected


def test_orders_differ_between_seeds_and_epochs_but_not_between_runs():
    lengths = [9] * 32

    def first_tokens(seed, rows=32):
        iterator = iter(rows_of(lengths, length=8, method="concat", seed=seed, block_tokens=10**6))
        return [int(next(iterator)["tokens"][0]) for _ in range(rows)]

    assert first_tokens(1) == first_tokens(1)
    assert first_tokens(1) != first_tokens(2)
    two_epochs = first_tokens(1, 64)
    assert sorted(two_epochs[:32]) == sorted(two_epochs[32:])
    assert two_epochs[:32] != two_epochs[32:]


def test_pieces_of_a_long_document_are_spread():
    iterator = iter(rows_of([801] * 4, length=8, method="concat", block_tokens=10**6))
    documents = [int(next(iterator)["document"][0]) for _ in range(40)]
    assert len(set(documents)) == 4
    assert all(len(set(documents[start : start + 12])) > 1 for start in range(0, 36, 12))


def test_borders_of_a_long_document_move_between_epochs():
    iterator = iter(rows_of([2000], length=64, method="first_fit", block_tokens=10**6))
    starts = {}
    while (epoch := iterator.get_state()["epoch"]) < 4:
        row = next(iterator)
        epoch = iterator.get_state()["epoch"]
        starts.setdefault(epoch, set()).update(
            row["tokens"][(row["positions"] == 0) & (row["segment_ids"] > 0)].tolist()
        )
    assert len({frozenset(value) for value in starts.values()}) == len(starts) >= 4


@pytest.mark.parametrize("method", ["concat", "first_fit"])
def test_full_length_pieces_stay_whole(method):
    """A row of context that could be whole is never made of two halves."""
    iterator = iter(rows_of([16 * 9 + 5] * 3, length=16, method=method, block_tokens=10**6))
    rows = [next(iterator) for _ in range(24)]
    whole = sum(row["segment_ids"].max() == 1 and row["loss_mask"].all() for row in rows)
    assert whole >= 20


@pytest.mark.parametrize("method", ["concat", "first_fit"])
def test_a_shard_without_text_is_an_error_and_no_endless_loop(method):
    with pytest.raises(UserError, match="no text in the documents of this shard"):
        next(iter(rows_of([0, 1, 0] * 100, length=4, method=method)))
    # A few documents with text among many without are no error.
    iterator = iter(rows_of([0] * 200 + [5], length=4, method=method))
    assert [next(iterator)["loss_mask"].sum() for _ in range(5)] == [4.0] * 5
