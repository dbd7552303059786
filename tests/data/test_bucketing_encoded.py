"""Encoded rows: what the encoder gave is what is read, and what it may not give is said."""

import json
import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlm.data.documents import digest
from fastlm.data.encoded import EncodedExamples, log_once
from fastlm.data.examples.base import Examples
from fastlm.errors import UserError


class Numbered(Examples):
    """Rows that hold their number."""

    name, fields = "numbered", ("n",)

    def __init__(self, count):
        self.count, self.fingerprint = count, digest(str(count))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"n": index}


def encoded(values, folder, fingerprint="x"):
    """Encodes one row per value; a value is what the encoder gives."""
    return EncodedExamples(Numbered(len(values)), lambda row: values[row["n"]], fingerprint, folder)


ROW = st.fixed_dictionaries(
    {
        "tokens": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(lambda v: np.array(v, np.int64)),
        "weights": st.lists(st.floats(-10, 10, width=32), max_size=5).map(lambda v: np.array(v, np.float32)),
        "label": st.integers(0, 9),
        "score": st.floats(0, 1, width=32),
        "flag": st.booleans(),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.none() | ROW, min_size=1, max_size=8))
def test_rows_are_read_as_they_were_encoded(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("encoded")
    kept = [value for value in values if value is not None]
    if not kept:
        with pytest.raises(UserError, match=f"dropped all {len(values)} rows of numbered"):
            encoded(values, folder)
        assert not list(folder.rglob("*.npy"))  # lest a mended encoder finds the empty cache
        return
    rows = encoded(values, folder)
    assert rows.arrays == {"tokens": "int32", "weights": "float32"}
    assert rows.scalars == {"flag": "int32", "label": "int32", "score": "float32"}
    assert rows.records.tolist() == [n for n, value in enumerate(values) if value is not None]
    assert (len(rows), rows.total, rows.dropped) == (len(kept), len(values), len(values) - len(kept))
    assert rows.lengths.tolist() == [[len(value["tokens"]), len(value["weights"])] for value in kept]
    for number, value in enumerate(kept):
        for name in rows.arrays:
            assert rows.array(name, number).tolist() == value[name].tolist()
        for name in rows.scalars:
            assert rows.scalar(name, number) == value[name]


def test_lists_and_whole_numbers_are_taken(tmp_path):
    rows = encoded([{"x": [1.5], "y": np.float64(2)}, {"x": [], "y": 3}, {"x": [2], "y": 0.5}], tmp_path)
    assert [rows.array("x", n).tolist() for n in range(3)] == [[1.5], [], [2.0]]
    assert [float(rows.scalar("y", n)) for n in range(3)] == [2.0, 3.0, 0.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{"x": [1]}, {"y": [1]}], r"row 1 of numbered: the encoder gave \['y'\], but \['x'\] before"),
        ([{"x": [1]}, {"x": 1}], "row 1 of numbered: 'x' is 0-D int32, but was int32 before"),
        ([{"x": [1]}, {"x": [0.5]}], "'x' is 1-D float32, but was int32 before"),
        ([{"x": [[1]]}], "row 0 of numbered: 'x' is 2-D int64, and neither a number nor a 1-D array"),
        ([{"x": "text"}], "'x' is 0-D <U4, and neither"),
        ([{"x": [2**31]}], "'x' has a number beyond 32 bits"),
        ([{"x": 1}], r"gave \['x'\], with no 1-D array"),
        ([{"x": [1], "epoch": 1}], "batches add names like 'epoch' themselves"),
        ([{"x": [1], "x_length": 1}], "batches add names like 'x_length' themselves"),
    ],
)
def test_what_an_encoder_may_not_give(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        encoded(values, tmp_path)
    assert not list(tmp_path.rglob("*.npy")) and not list((tmp_path / "encoded").iterdir())


def test_the_cache_follows_rows_and_encoder(tmp_path):
    first = encoded([{"x": [1]}], tmp_path)
    assert encoded([{"x": [2]}], tmp_path).array("x", 0).tolist() == [1]  # the same names: the same cache
    other = encoded([{"x": [2]}], tmp_path, "y")
    assert other.array("x", 0).tolist() == [2] and other.fingerprint != first.fingerprint
    assert encoded([{"x": [1]}, {"x": [3]}], tmp_path).fingerprint != first.fingerprint


@pytest.fixture
def warned(caplog):
    """Opens rows as another run would, and returns what that logs from warnings on."""

    def opened(*arguments):
        log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            return encoded(*arguments), caplog.messages.copy()

    return opened


def test_how_many_rows_were_cut_is_said_by_every_run(tmp_path, warned):
    values = [{"x": [1], "cut": ["at its end", "too wide"]}, {"x": [1], "cut": ()}, {"x": [2], "cut": ["at its end"]}]
    for _ in range(2):
        rows, messages = warned(values, tmp_path)
        assert messages == ["numbered: 2 of 3 rows are cut: at its end; 1 of 3 rows are cut: too wide"]
    assert rows.arrays == {"x": "int32"} and rows.scalars == {}
    assert rows.cut == {"at its end": 2, "too wide": 1}
    assert warned([{"x": [1], "cut": ()}], tmp_path)[1] == []


def test_a_cache_from_before_cuts_were_counted_opens(tmp_path, warned):
    encoded([{"x": [7], "cut": ["x"]}], tmp_path)
    [folder] = (tmp_path / "encoded").iterdir()
    fields = json.loads((folder / "fields.json").read_text())
    del fields["cut"]
    (folder / "fields.json").write_text(json.dumps(fields))
    rows, messages = warned([{"x": [7]}], tmp_path)
    assert (rows.array("x", 0).tolist(), rows.cut, messages) == ([7], {}, [])
