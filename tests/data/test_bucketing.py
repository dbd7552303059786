"""Bucketed batches: every row once an epoch, whatever the shapes, processes and interruptions."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlm.data import bucketing, encoded
from fastlm.data.documents import digest
from fastlm.data.examples.base import Examples
from fastlm.errors import UserError

BUCKETS = (4, 8, 16)


class Rows(Examples):
    """Rows from a list."""

    def __init__(self, rows, name="rows"):
        self.rows, self.name, self.fields = rows, name, tuple(rows[0])
        self.fingerprint = digest(name, json.dumps(rows))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def pairs(count, seed=0, longest=16, name="rows"):
    """Rows with two lengths that go together, as those of translations do; `source` counts from `number`."""
    rng = np.random.default_rng(seed)
    sources = rng.integers(1, longest, count, endpoint=True)
    targets = np.clip(sources + rng.integers(-2, 3, count), 1, longest)
    rows = [{"number": n, "s": int(s), "t": int(t)} for n, (s, t) in enumerate(zip(sources, targets))]
    return Rows(rows, name)


def encode(row):
    return {
        "source": np.arange(row["s"]) + row["number"],
        "target": -np.ones(row["t"]),
        "number": row["number"],
    }


def training(examples, **settings):
    defaults = {"encoder_fingerprint": "1", "batch_size": 4, "buckets": BUCKETS, "seed": 3, "prefetch": 0}
    return bucketing.training_batches(examples, encode, **(defaults | settings))


def evaluation(examples, **settings):
    defaults = {"encoder_fingerprint": "1", "batch_size": 4, "buckets": BUCKETS}
    return list(bucketing.evaluation_batches(examples, encode, **(defaults | settings)))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def joined(parts):
    return [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts)]


def same(left, right):
    return len(left) == len(right) and all(
        set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a) for a, b in zip(left, right)
    )


def check_rows(batch, rows):
    """Every array of a batch holds what its row was encoded to, and zeros."""
    for line, number in enumerate(batch["record"].tolist()):
        if number < 0:
            continue
        expected = encode(rows[number])
        assert batch["number"][line] == expected["number"]
        for name in ("source", "target"):
            length = batch[f"{name}_length"][line]
            assert length == len(expected[name])
            assert np.array_equal(batch[name][line, :length], expected[name]) and not batch[name][line, length:].any()


def test_names_shapes_and_types():
    rows = pairs(40)
    for batch in take(training(rows), 30):
        assert set(batch) == {
            *("source", "source_length", "target", "target_length", "number", "row_mask", "record", "epoch")
        }
        for name in ("source_length", "target_length", "number", "record", "epoch"):
            assert batch[name].dtype == np.int32 and batch[name].shape == (4,)
        assert batch["source"].dtype == np.int32 and batch["target"].dtype == np.float32
        assert batch["source"].shape[1] in BUCKETS and batch["target"].shape[1] in BUCKETS
        assert batch["row_mask"].dtype == np.float32 and batch["row_mask"].all()
        check_rows(batch, rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    most_shapes=st.integers(1, 5),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
def test_every_row_comes_once_an_epoch(tmp_path, count, batch_size, most_shapes, seed, epochs):
    rows = pairs(count, seed)
    iterator = training(rows, batch_size=batch_size, most_shapes=most_shapes, seed=seed, data_dir=tmp_path)
    seen, shapes, drawn = collections.Counter(), set(), 0
    # A batch waits in each shape's queue, so an epoch is through when a batch more per shape was given.
    while drawn < count * epochs + batch_size * most_shapes:
        batch = next(iterator)
        assert batch["source"].shape[0] == batch_size
        seen.update(zip(batch["epoch"].tolist(), batch["record"].tolist()))
        shapes.add((batch["source"].shape[1], batch["target"].shape[1]))
        drawn += batch_size
    assert max(seen.values()) == 1 and len(shapes) <= most_shapes
    complete = collections.Counter(epoch for epoch, _ in seen)
    queued = {epoch: count - complete[epoch] for epoch in range(epochs)}
    # What is not yet seen of the first epochs waits in a queue that has not filled since.
    assert sum(queued.values()) <= (batch_size - 1) * most_shapes
    assert sum(complete.values()) == drawn


def test_an_epoch_is_complete_after_the_next():
    """With queues shorter than an epoch's rows of their shape, nothing waits longer than one epoch."""
    rows = pairs(60)
    seen = collections.Counter()
    for batch in take(training(rows), 60 * 4 // 4):
        seen.update(batch["epoch"].tolist())
    assert [seen[epoch] for epoch in range(3)] == [60, 60, 60]


def test_each_epoch_and_seed_has_its_own_order():
    rows = pairs(64, longest=4)

    def order(**settings):
        return [batch["record"].tolist() for batch in take(training(rows, **settings), 32)]

    first = order()
    assert first == order() and first[:16] != first[16:] and first != order(seed=4)


def test_batches_of_all_shapes_are_mixed():
    rows = pairs(400)
    lengths = [batch["source"].shape[1] for batch in take(training(rows), 50)]
    assert set(lengths) == set(BUCKETS)
    assert sum(a != b for a, b in itertools.pairwise(lengths)) > 20


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batch_does_not_depend_on_processes(processes):
    rows = pairs(50)
    parts = [take(training(rows, process_index=i, process_count=processes), 30) for i in range(processes)]
    assert same(joined(parts), take(training(rows), 30))
    parts = [evaluation(rows, process_index=i, process_count=processes) for i in range(processes)]
    assert same(joined(parts), evaluation(rows))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(0, 40), elsewhere=st.integers(0, 9), batch_size=st.sampled_from([2, 4, 8]))
def test_restoring_is_exact(tmp_path, steps, elsewhere, batch_size):
    mixture = [(pairs(30, 1, name="a"), 0.7), (pairs(11, 2, name="b"), 0.3)]
    straight = training(mixture, batch_size=batch_size, data_dir=tmp_path)
    take(straight, steps)
    state = json.loads(json.dumps(straight.get_state()))
    restored = training(mixture, batch_size=batch_size, data_dir=tmp_path)
    take(restored, elsewhere)  # where it was before must not matter
    restored.set_state(state)
    assert same(take(restored, 12), take(straight, 12))


def test_restoring_on_other_processes_and_with_reading_ahead():
    rows = pairs(50)
    two = [training(rows, process_index=i, process_count=2, prefetch=3) for i in range(2)]
    for iterator in two:
        take(iterator, 7)
    state = {shard: entry for iterator in two for shard, entry in iterator.get_state().items()}
    alone = training(rows)
    alone.set_state(state)
    assert same(joined([take(iterator, 5) for iterator in two]), take(alone, 5))
    for iterator in two:
        iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(two[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size was 4, now it is 8"),
        ({"buckets": (8, 16)}, "buckets was"),
        ({"seed": 4}, "seed was 3, now it is 4"),
        ({"encoder_fingerprint": "2"}, "encoder was 1, now it is 2"),
        ({"most_shapes": 1}, "most_shapes was 8, now it is 1"),
        ({"examples": pairs(50, 1)}, "rows was"),
    ],
)
def test_a_position_in_other_data_is_refused(change, message):
    state = training(pairs(50)).get_state()
    with pytest.raises(UserError, match=message):
        training(**({"examples": pairs(50)} | change)).set_state(state)


def test_shares_of_a_mixture():
    mixture = [(pairs(30, 1, name="a"), 3), (pairs(90, 2, name="b"), 1)]
    batches = take(training(mixture), 200)
    records = np.concatenate([batch["record"] for batch in batches])
    assert abs((records < 30).mean() - 0.75) < 0.03
    assert records.max() == 119 and records.min() == 0  # `b` is numbered after `a`
    epochs = {name: max(b["epoch"][b["record"] >= low].max(initial=0) for b in batches) for name, low in (("b", 30),)}
    assert epochs["b"] == 200 // 90  # each source counts its own epochs
    for batch in batches[:20]:
        expected = [encode(mixture[n >= 30][0][n - 30 * (n >= 30)])["source"][0] for n in batch["record"].tolist()]
        assert batch["source"][:, 0].tolist() == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 40),
    batch_size=st.sampled_from([1, 2, 6]),
    most_shapes=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_evaluation_sees_every_row_once(tmp_path, count, batch_size, most_shapes, seed):
    rows = pairs(count, seed)
    batches = evaluation(rows, batch_size=batch_size, most_shapes=most_shapes, data_dir=tmp_path)
    records = [record for batch in batches for record in batch["record"].tolist() if record >= 0]
    assert sorted(records) == list(range(count))
    for batch in batches:
        assert np.array_equal(batch["row_mask"], batch["record"] >= 0) and batch["row_mask"][0] == 1
        assert (batch["source_length"] > 0).all()  # filling rows are no empty rows
        check_rows(batch, rows)
    shapes = [(batch["source"].shape[1], batch["target"].shape[1]) for batch in batches]
    assert shapes == sorted(shapes) and len(set(shapes)) <= most_shapes
    assert sum((batch["row_mask"] == 0).any() for batch in batches) <= len(set(shapes))


def test_evaluation_is_ordered_by_length_within_a_shape():
    batches = evaluation(pairs(80), batch_size=8)
    for _, group in itertools.groupby(batches, key=lambda batch: (batch["source"].shape, batch["target"].shape)):
        totals = [(b["source_length"] + b["target_length"])[b["row_mask"] > 0] for b in group]
        assert (np.diff(np.concatenate(totals)) >= 0).all()


def test_a_limited_evaluation_spreads_over_all_lengths():
    rows = pairs(200)
    some, everything = evaluation(rows, limit=5), evaluation(rows)
    assert len(some) == 5 and len(evaluation(rows, limit=10**6)) == len(everything)
    assert same(some[:1], everything[:1]) and same(some[-1:], everything[-1:])
    assert {batch["source"].shape[1] for batch in some} == set(BUCKETS)


def test_evaluation_of_a_mixture_reads_each_source_once():
    mixture = [(pairs(7, 1, name="a"), 0.9), (pairs(5, 2, name="b"), 0.1)]
    records = np.concatenate([batch["record"] for batch in evaluation(mixture)])
    assert sorted(records[records >= 0].tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be a positive multiple of the 1 processes"),
        ({"process_count": 3}, "batch_size 4 must be a positive multiple of the 3 processes"),
        ({"buckets": ()}, r"buckets \(\) must be rising lengths"),
        ({"buckets": (8, 8)}, r"buckets \(8, 8\) must be rising lengths"),
        ({"buckets": (0, 8)}, r"buckets \(0, 8\) must be rising lengths"),
        (
            {"buckets": (4, 8)},
            r"\d+ of 50 rows of rows are longer than the last bucket 8 \(row \d+: '(source|target)' has 16",
        ),
        ({"most_shapes": 0}, "most_shapes must be at least 1, not 0"),
        ({"examples": []}, "no examples are named"),
        ({"examples": [(pairs(5), -1)]}, "the share of rows must be positive, not -1"),
    ],
)
def test_what_does_not_fit_is_an_error(settings, message):
    for batches in (training, evaluation):
        with pytest.raises(UserError, match=message) as raised:
            batches(**({"examples": pairs(50)} | settings))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [{"seed": -1}, {"prefetch": -1}])
def test_numbers_below_zero_are_refused(settings):
    with pytest.raises(UserError, match="must be at least 0"):
        training(pairs(5), **settings)


def test_sources_with_other_fields_are_refused():
    def by_name(row):
        return {"tokens": [1]} if row["s"] < 3 else {"tokens": [1], "label": 1}

    low, high = Rows([{"s": 1}], "low"), Rows([{"s": 5}], "high")
    with pytest.raises(ValueError, match="the encoder gave .*label.* for high"):
        bucketing.training_batches([(low, 1), (high, 1)], by_name, encoder_fingerprint="", batch_size=1, buckets=(4,))


def test_what_is_dropped_and_padded_is_said_once(caplog):
    rows = pairs(50, name="said once")

    def odd(row):
        return encode(row) if row["number"] % 2 else None

    for _ in range(3):
        with caplog.at_level("INFO"):
            batches = list(
                bucketing.evaluation_batches(rows, odd, encoder_fingerprint="odd", batch_size=4, buckets=BUCKETS)
            )
    records = np.concatenate([batch["record"] for batch in batches])
    assert sorted(records[records >= 0].tolist()) == list(range(1, 50, 2))
    messages = [record.getMessage() for record in caplog.records if "said once" in record.getMessage()]
    assert messages[0] == "encoding said once (50 rows), once"
    assert messages[1] == "said once: 25 of 50 rows dropped by the encoder"
    assert messages[2].startswith("said once: rows by shape (source x target): ") and messages[2].endswith("% padding")
    assert len(messages) == 3


def test_a_second_start_encodes_nothing(tmp_path, monkeypatch):
    rows = pairs(20)
    first = take(training(rows, data_dir=tmp_path), 5)
    monkeypatch.setattr(encoded, "_write", lambda *_: pytest.fail("encoded again"))
    assert same(first, take(training(rows, data_dir=tmp_path), 5))
    with pytest.raises(pytest.fail.Exception):
        training(rows, data_dir=tmp_path, encoder_fingerprint="2")
