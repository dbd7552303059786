"""Evaluation: every target once, with its context, in fixed order, on any number of processes."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data import evaluation, pipeline, tokenizers
from fastlm.errors import UserError

TOKENIZER = tokenizers.make("bytes")
TEXTS = ["ab", "", "x" * 30 + "yz", "the quick brown fox", "é", "1234567", "q" * 8, "last one"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluation") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return f"jsonl:{path}"


def run(spec, **settings):
    defaults = {"split": "all", "length": 8, "batch_size": 4}
    return list(pipeline.evaluation_batches(spec, TOKENIZER, **(defaults | settings)))


@given(pairs=st.integers(0, 100), length=st.integers(1, 20), data=st.data())
def test_windows_score_each_pair_once_with_context(pairs, length, data):
    overlap = data.draw(st.integers(0, length - 1))
    scored = []
    for piece, context in evaluation.windows(3, pairs, length, overlap):
        assert piece.record == 3 and 1 <= piece.length <= length
        for pair in range(piece.start + context, piece.stop):
            scored.append(pair)
            assert pair - piece.start >= min(overlap, pair)
    assert scored == list(range(pairs))


@pytest.mark.parametrize("overlap", [0, 3, 7])
@pytest.mark.parametrize("length", [8, 64])
def test_every_target_is_scored_once_in_order(spec, length, overlap):
    batches = run(spec, length=length, overlap=overlap)
    expected = [list(text.encode()) + [TOKENIZER.eos] if text else [] for text in TEXTS]
    scored = [[] for _ in TEXTS]
    for batch in batches:
        mask = batch["loss_mask"] > 0
        assert (batch["segment_ids"][mask] > 0).all()
        for document, target in zip(batch["document"][mask].tolist(), batch["targets"][mask].tolist()):
            scored[document].append(target)
    assert scored == expected
    count = sum(int(TOKENIZER.token_bytes[batch["targets"][batch["loss_mask"] > 0]].sum()) for batch in batches)
    assert count == sum(len(text.encode()) for text in TEXTS)


def test_context_is_there_but_not_scored(spec):
    rows = [row for batch in run(spec, overlap=3) for row in zip(*batch.values())]
    names = list(run(spec, overlap=3)[0])
    for values in rows:
        row = dict(zip(names, values))
        for segment in range(1, row["segment_ids"].max() + 1):
            where = row["segment_ids"] == segment
            mask = row["loss_mask"][where]
            opens_document = row["tokens"][where][0] == TOKENIZER.bos
            assert mask.tolist() == [0.0] * (0 if opens_document else 3) + [1.0] * (
                len(mask) - (0 if opens_document else 3)
            )
            assert np.array_equal(row["positions"][where], np.arange(len(mask)))


def test_last_batch_is_padded(spec):
    batches = run(spec, batch_size=5)
    assert all(batch["tokens"].shape == (5, 8) for batch in batches)
    padding = batches[-1]["segment_ids"] == 0
    assert padding.any()
    assert (batches[-1]["loss_mask"][padding] == 0).all() and (batches[-1]["document"][padding] == -1).all()


def test_two_passes_are_equal(spec):
    for left, right in itertools.zip_longest(run(spec), run(spec)):
        assert all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(spec, processes):
    alone = run(spec)
    parts = [run(spec, process_index=index, process_count=processes) for index in range(processes)]
    assert {len(part) for part in parts} == {len(alone)}
    for whole, step in zip(alone, zip(*parts)):
        assert all(np.array_equal(whole[name], np.concatenate([part[name] for part in step])) for name in whole)


def test_limit_counts_batches(spec):
    assert len(run(spec)) > 2
    limited = run(spec, limit=2)
    assert len(limited) == 2
    assert np.array_equal(limited[1]["tokens"], run(spec)[1]["tokens"])


def test_several_sources_are_read_one_after_the_other(spec):
    twice = run([(spec, 0.9), (spec, 0.1)], length=64)
    documents = np.concatenate([batch["document"][batch["loss_mask"] > 0] for batch in twice])
    assert set(documents) == {i for i, text in enumerate(TEXTS * 2) if text}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 8}, "overlap 8 must be at least 0 and less than the length 8"),
        ({"overlap": -1}, "overlap -1"),
        ({"batch_size": 3, "process_count": 2}, "batch_size 3 must be a positive multiple of the 2 processes"),
        ({"split": "tset"}, "no split 'tset'; did you mean 'test'"),
    ],
)
def test_errors_come_before_the_first_batch(spec, settings, message):
    with pytest.raises(UserError, match=message):
        pipeline.evaluation_batches(spec, TOKENIZER, **({"split": "all", "length": 8, "batch_size": 4} | settings))


@pytest.mark.parametrize("length", [3, 8, 64])
def test_streams_go_on_from_batch_to_batch_and_score_every_target_once(spec, length):
    batches = run(spec, length=length, batch_size=2, stream=True, overlap=2 if length > 2 else 0)
    expected = {i: list(text.encode()) + [TOKENIZER.eos] for i, text in enumerate(TEXTS) if text}
    scored, open_document = {}, [-1, -1]
    for batch in batches:
        for lane in range(2):
            documents = batch["document"][lane][batch["loss_mask"][lane] > 0].tolist()
            if documents:
                assert (documents[0] == open_document[lane]) == (not batch["reset"][lane])
            targets = batch["targets"][lane][batch["loss_mask"][lane] > 0].tolist()
            for document, target in zip(documents, targets):
                scored.setdefault(document, []).append(target)
            last = documents[-1] if documents else -1
            ended = last < 0 or len(scored[last]) == len(expected[last])
            open_document[lane] = -1 if ended else last
    assert scored == expected


def test_streams_are_the_same_rows_on_any_number_of_processes(spec):
    whole = run(spec, batch_size=4, stream=True)
    halves = [run(spec, batch_size=4, stream=True, process_index=i, process_count=2) for i in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), batch[name])
