"""Shuffled records: a permutation in every epoch, small or large."""

import pytest

from fastlm.data import records


@pytest.mark.parametrize("small", [1 << 16, 10])
def test_every_epoch_is_another_permutation(monkeypatch, small):
    monkeypatch.setattr(records, "_SMALL", small)
    shuffled = records.ShuffledRecords(50, first=1, step=4, seed=7)
    assert len(shuffled) == 13
    epochs = [[shuffled[epoch * 13 + i] for i in range(13)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(1, 50, 4)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # Random access: an epoch can be asked for out of turn.
    assert [shuffled[13 + i] for i in range(13)] == epochs[1]
    again = records.ShuffledRecords(50, first=1, step=4, seed=7)
    assert [again[i] for i in range(13)] == epochs[0]
    other = records.ShuffledRecords(50, first=1, step=4, seed=8)
    assert [other[i] for i in range(13)] != epochs[0]
