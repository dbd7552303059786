"""Cached targets: exact after rounding, joined to the right rows, whole or refused, and small."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import bucketing, packing, pipeline, targets, tokenizers
from fastlm.data.examples import load as load_examples
from fastlm.data.targets import manifest, records
from fastlm.errors import UserError
from fastlm.ops import sparse_targets

TOKENIZER = tokenizers.make("bytes")
VOCAB, LENGTH, BATCH = 300, 16, 8
METHOD = "sampled(draws=12)"
TABLE = jax.random.normal(jax.random.key(5), (VOCAB, VOCAB)) * 3  # a bigram model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets_corpus")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), size=rng.integers(20, 90))) for _ in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"jsonl:{folder}/texts.jsonl"


def stream(source, **changed):
    given = {"split": "all", "length": LENGTH, "batch_size": BATCH, "packing": "first_fit", "seed": 3, "prefetch": 0}
    return pipeline.training_batches(source, TOKENIZER, **(given | changed))


def make_key(batches, **changed):
    given = {"teacher": "abc", "tokenizer": TOKENIZER.fingerprint, "vocab_size": VOCAB, "method": METHOD, "seed": 7}
    return targets.Key(**(given | {"data": batches.identity} | changed))


@jax.jit
def taught(tokens, following, rows):
    method = sparse_targets.make(METHOD)
    uniforms = sparse_targets.row_uniforms(method, 7, rows, tokens.shape[1])
    return method(TABLE[tokens], uniforms, following)


def teach(batch):
    return taught(batch["tokens"], batch["targets"], batch["row"])


def write(source, folder, *, steps=6, steps_per_file=2, teach=teach, say=lambda text: None, changed=None, **more):
    batches = stream(source, **(changed or {}))
    return targets.write(
        batches, teach, folder, make_key(batches), steps=steps, steps_per_file=steps_per_file, say=say, **more
    )


def read(source, folder, *, steps=0, prefetch=0, process=(0, 1), **changed):
    place = dict(zip(("process_index", "process_count"), process))
    batches = stream(source, **place, **changed)
    store = targets.Store(folder, make_key(batches), steps)
    return targets.WithTargets(batches, store, prefetch=prefetch, **place)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(left, right):
    return len(left) == len(right) and all(
        set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a) for a, b in zip(left, right)
    )


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """A folder with the targets of six batches."""
    folder = tmp_path_factory.mktemp("written") / "targets"
    write(source, folder)
    return folder


@pytest.fixture
def copied(written, tmp_path):
    """One that a test may damage."""
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# --- what comes back -----------------------------------------------------------------------------


def test_what_was_written_comes_back_at_the_places_that_count(source, written):
    for step, batch in enumerate(take(read(source, written), 6)):
        first = step * BATCH
        direct = teach(batch | {"row": np.arange(first, first + BATCH, dtype=np.int32)})
        counts = batch["loss_mask"] > 0
        assert not counts.all() and not batch["target_weights"][~counts].any()
        for name in records.NAMES:
            wanted = np.asarray(getattr(direct, name.removeprefix("target_")))
            wanted = np.where(counts[..., None] if wanted.ndim == 3 else counts, wanted, 0)
            if name in ("target_entropy", "target_log_probability"):
                wanted = wanted.astype(np.float16).astype(np.float32)
            assert batch[name].dtype == wanted.dtype
            np.testing.assert_array_equal(batch[name], wanted)


def test_batches_are_those_of_the_run(source, written):
    plain = take(stream(source), 6)
    joined = take(read(source, written), 6)
    assert same(plain, [{name: a for name, a in batch.items() if name not in records.NAMES} for batch in joined])


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_run_goes_on_where_it_was(source, written, steps, prefetch):
    straight = read(source, written, prefetch=prefetch)
    take(straight, steps)
    state = json.loads(json.dumps(straight.get_state()))
    expected = take(straight, 3)
    again = read(source, written, prefetch=prefetch)
    take(again, 2)  # where it was before must not matter
    again.set_state(state)
    assert same(expected, take(again, 3))
    straight.close()
    again.close()


def test_a_run_goes_on_with_other_processes(source, written):
    whole = take(read(source, written), 4)
    two = [read(source, written, process=(index, 2)) for index in range(2)]
    parts = [take(iterator, 3) for iterator in two]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*parts)]
    assert same(whole[:3], joined)
    state = {shard: entry for iterator in two for shard, entry in iterator.get_state().items()}
    one = read(source, written)
    one.set_state(state)
    assert same(whole[3:], take(one, 1))


def test_any_row_can_be_asked_for(source, written):
    batches = stream(source)
    store = targets.Store(written, make_key(batches))
    assert len(store) == 6 * BATCH
    _, rows = store.get([41, 0, 3, 41])
    whole = take(read(source, written), 6)
    for number, row in zip([41, 0, 3, 41], rows):
        step, index = divmod(number, BATCH)
        assert all(np.array_equal(row[name], whole[step][name][index]) for name in records.NAMES)


def test_rows_of_fields_have_targets_too(tmp_path):
    """Translation and its like: batches of several lengths, which say nothing of a loss_mask."""
    (tmp_path / "rows.tsv").write_text("a\n" + "".join("x" * (1 + i % 11) + "\n" for i in range(30)))
    encode = lambda row: {
        "tokens": np.frombuffer(row["a"].encode(), np.uint8).astype(np.int32) + np.arange(len(row["a"]))
    }
    rows = load_examples(f"tsv:{tmp_path}/rows.tsv", "all")
    given = {"encoder_fingerprint": "1", "batch_size": 4, "buckets": (6, 12), "most_shapes": 2, "data_dir": tmp_path}
    make = lambda: bucketing.training_batches(rows, encode, prefetch=0, **given)
    following = lambda batch: taught(batch["tokens"], batch["tokens"], batch["row"])
    key = make_key(make())
    targets.write(make(), following, tmp_path / "t", key, steps=4, steps_per_file=4, say=str)
    found = take(targets.WithTargets(make(), targets.Store(tmp_path / "t", key), prefetch=0), 4)
    assert {batch["target_ids"].shape for batch in found} == {(4, 6, 12), (4, 12, 12)}
    assert all(np.allclose(batch["target_weights"].sum(-1), 1) for batch in found)


@settings(max_examples=40)
@given(st.data())
def test_a_record_is_exact_after_rounding(data):
    vocab = data.draw(st.sampled_from([3, 300, 1 << 16, 70000]))
    methods = ["sampled(draws=20)", "sampled(draws=300)", "sampled(draws=20, proposal_exponent=0.5)", "top_k(k=5)"]
    method = sparse_targets.make(data.draw(st.sampled_from(methods)))
    length, slots = data.draw(st.integers(0, 4)), method.slots(vocab)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weights = rng.random((length, slots)) * (rng.random((length, slots)) < 0.6)
    if "exponent=1.0" in sparse_targets.describe(method):
        weights = np.rint(weights * method.draws).astype(np.float32) * method.weight
    else:
        weights = weights.astype(np.float16).astype(np.float32)
    ids = np.stack([rng.permutation(vocab)[:slots] for _ in range(length)]) if length else np.zeros((0, slots), int)
    halves = lambda: rng.normal(size=length).astype(np.float16).astype(np.float32)
    row = {"target_ids": ids, "target_weights": weights, "target_entropy": halves(), "target_log_probability": halves()}
    row["target_best"] = rng.integers(0, vocab, length)
    codec = records.Codec(method, vocab, hashes=2)
    hashes = rng.integers(0, 1 << 63, 2).astype(np.uint64)
    found_hashes, found = codec.decode(codec.encode(hashes, row))
    np.testing.assert_array_equal(found_hashes, hashes)
    for name in ("target_entropy", "target_log_probability", "target_best"):
        np.testing.assert_array_equal(found[name], row[name])
    dense = [
        [dict(zip(i[w > 0].tolist(), w[w > 0].tolist())) for i, w in zip(r["target_ids"], r["target_weights"])]
        for r in (row, found)
    ]
    assert dense[0] == dense[1]


# --- writing -------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_writers_give_the_bytes_of_one(source, written, tmp_path):
    write(source, tmp_path, writer_index=1, writer_count=2)
    with pytest.raises(
        UserError, match="cut short: 16 of 48 rows are there; 00000000-000.array_record has 0 of its 16"
    ):
        read(source, tmp_path)
    write(source, tmp_path, writer_index=0, writer_count=2)
    assert files(tmp_path) == files(written)


def test_processes_that_each_see_a_slice_write_together(source, written, tmp_path):
    for index in (1, 0):
        process = {"process_index": index, "process_count": 2}
        write(source, tmp_path, slices=2, slice_index=index, changed=process)
    assert same(take(read(source, tmp_path), 6), take(read(source, written), 6))
    four = [take(read(source, tmp_path, process=(index, 4)), 6) for index in range(4)]
    joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*four)]
    assert same(joined, take(read(source, written), 6))
    with pytest.raises(UserError, match="written by 2 processes together, not 1"):
        write(source, tmp_path)


def test_a_stopped_writer_goes_on(source, written, tmp_path):
    lines, calls = [], []

    def interrupted(batch):
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return teach(batch)

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path, teach=interrupted, say=lines.append)
    assert "stopped; 16/48 rows" in lines[-1]
    assert set(files(tmp_path)) == {manifest.FILE, "00000000-000.array_record"}
    calls.clear()
    counted = lambda batch: calls.append(batch) or teach(batch)
    report = write(source, tmp_path, teach=counted)
    assert report.kept == 1 and report.rows == 32 and len(calls) == 4
    assert files(tmp_path) == files(written)
    assert write(source, tmp_path, teach=None).kept == 3  # nothing is left to ask a teacher


def test_more_steps_are_added(source, written, copied):
    write(source, copied, steps=9)
    before, after = take(read(source, written), 6), take(read(source, copied), 10)
    assert same(before, after[:6])
    assert targets.Store(copied, make_key(stream(source))).steps == 10  # whole files
    assert write(source, copied, steps=4).kept == 2
    assert targets.Store(copied, make_key(stream(source)), 10).steps == 10


def test_progress_is_told(source, tmp_path):
    lines = []
    write(source, tmp_path, say=lines.append, every=0.0)
    assert lines[0].startswith("targets: 8/48 rows, ") and lines[0].endswith(" left")
    assert "bytes/token" in lines[-1] and "3 files of targets, 0 of them from before; 48/48 rows" in lines[-1]


def test_a_broken_teacher_is_not_written_down(source, tmp_path):
    def broken(batch):
        good = teach(batch)
        return dataclasses.replace(good, entropy=jnp.where(batch["row"][:, None] == 21, jnp.nan, good.entropy))

    with pytest.raises(UserError, match="numbers for row 21 of the stream are not finite .target_entropy"):
        write(source, tmp_path, teach=broken)
    wide = lambda batch: dataclasses.replace(teach(batch), weights=jnp.zeros((BATCH, LENGTH, 99)))
    with pytest.raises(ValueError, match="target_weights of shape"):
        write(source, tmp_path, teach=wide)
    beyond = lambda batch: dataclasses.replace(teach(batch), ids=jnp.full((BATCH, LENGTH, 12), VOCAB))
    with pytest.raises(ValueError, match="gave id 300, the key names a vocabulary of 300"):
        write(source, tmp_path, teach=beyond)


def test_few_bytes_are_needed(tmp_path, source):
    """What a token takes: less than two bytes for each id that was drawn, and nine beside, and 128 KiB a file."""
    larger = {"length": 256, "batch_size": 32}
    report = write(source, tmp_path, steps=4, steps_per_file=4, changed=larger)
    weights = np.concatenate([batch["target_weights"] for batch in take(read(source, tmp_path, **larger), 4)])
    used = (weights > 0).sum() / report.tokens
    assert report.tokens == ((weights > 0).any(-1)).sum()
    assert (report.bytes - (1 << 17)) / report.tokens < 2 * used + 9
    assert targets.Store(tmp_path, make_key(stream(source, **larger))).bytes == report.bytes


# --- refusals ------------------------------------------------------------------------------------


def refused(message, act):
    with pytest.raises(UserError, match=message) as raised:
        act()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": "xyz"}, "another teacher: abc, here it is xyz; set it back, or write targets anew"),
        ({"tokenizer": "xyz"}, "another tokenizer"),
        ({"vocab_size": 301}, "another vocab_size: 300, here it is 301"),
        ({"seed": 8}, "another seed: 7, here it is 8"),
        ({"method": "sampled(draws=13)"}, "another method: sampled.draws=12, proposal_exponent=1.0., here"),
        ({"method": "top_k(k=12)"}, "another method"),
    ],
)
def test_foreign_targets_are_refused(source, written, changed, message):
    batches = stream(source)
    key = make_key(batches, **changed)
    refused(message, lambda: targets.Store(written, key))
    refused(message, lambda: targets.write(batches, teach, written, key, steps=6))


def test_a_default_that_is_left_out_is_no_difference(source):
    assert make_key(stream(source)) == make_key(stream(source), method="sampled(proposal_exponent=1.0, draws=12)")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "another data.seed: 3, here it is 4"),
        ({"length": 17}, "another data.length: 16, here it is 17"),
        ({"packing": "concat"}, "another data.packing: first_fit, here it is concat"),
        ({"split": "all[:20]"}, "another data.split"),
    ],
)
def test_targets_of_another_stream_are_refused(source, written, changed, message):
    refused(message, lambda: read(source, written, **changed))
    store = targets.Store(written, make_key(stream(source)))
    refused(message, lambda: targets.WithTargets(stream(source, **changed), store))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_another_view_of_the_same_data_is_refused(source, written, monkeypatch, prefetch):
    iterator = read(source, written, prefetch=prefetch)
    take(iterator, 1)
    state = iterator.get_state()
    iterator.close()
    build_row = packing.build_row

    def shifted(*arguments):
        row = build_row(*arguments)
        return row | {"positions": row["positions"] + 1, "document": row["document"] + 1}

    monkeypatch.setattr("fastlm.data.packing.build_row", shifted)
    again = read(source, written, prefetch=prefetch)
    again.set_state(state)
    refused("row 0 of step 1 are of another view of the data .positions differ", lambda: next(again))
    again.close()


def test_other_arrays_are_another_view(source, written):
    class More(pipeline.BatchIterator):
        def __next__(self):
            return super().__next__() | {"extra": np.zeros(BATCH)}

    batches = stream(source)
    batches.__class__ = More
    iterator = targets.WithTargets(batches, targets.Store(written, make_key(batches)), prefetch=0)
    refused("of batches with loss_mask, positions, .*these have extra, loss_mask", lambda: next(iterator))


def test_nothing_there_is_refused(source, tmp_path):
    refused("no cached targets there .manifest.json is missing.; write them first", lambda: read(source, tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "targets 1"}', '{"format": "targets 1", "key": {"a": 1}}'])
def test_a_manifest_that_makes_no_sense_is_refused(source, copied, text):
    (copied / manifest.FILE).write_text(text)
    refused("cannot be read .*; write the targets anew", lambda: read(source, copied))


def test_another_format_is_refused(source, copied):
    path = copied / manifest.FILE
    path.write_text(path.read_text().replace("targets 1", "targets 9"))
    refused("format 'targets 9', this version reads 'targets 1'", lambda: read(source, copied))


@pytest.mark.parametrize("left", [None, 0, 0.5, 0.99])
def test_a_cache_cut_short_is_refused_and_mended(source, written, copied, left):
    path = copied / "00000002-000.array_record"
    whole = path.read_bytes()
    if left is None:
        path.unlink()
    else:
        path.write_bytes(whole[: int(len(whole) * left)])
    refused(
        "cut short: 32 of 48 rows are there; 00000002-000.array_record has 0 of its 16", lambda: read(source, copied)
    )
    assert take(read(source, copied, steps=2), 2)  # what is before it is still good
    assert write(source, copied).rows == 16
    assert files(copied) == files(written)


def test_damage_inside_a_file_is_refused(source, copied):
    path = copied / "00000000-000.array_record"
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)
    refused("00000000-000.array_record: row 0 of 16 cannot be read", lambda: take(read(source, copied), 2))


def test_an_end_before_training_ends_is_refused(source, written):
    refused("are for 6 steps, 7 are needed; write the rest", lambda: read(source, written, steps=7))
    iterator = read(source, written, prefetch=2)
    assert len(take(iterator, 6)) == 6
    refused("end with step 6, row 48 is beyond", lambda: next(iterator))
    iterator.close()


def test_positions_of_other_runs_are_refused(source, written, copied):
    iterator = read(source, written)
    refused("of a run without cached targets", lambda: iterator.set_state(stream(source).get_state()))
    state = iterator.get_state()
    state["0"]["targets"] = state["0"]["targets"] | {"of": "another"}
    refused("of a run with other cached targets", lambda: iterator.set_state(state))
    stream(source).set_state(iterator.get_state())  # without targets it may go on


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "numbers must be at least 1"),
        ({"writer_index": 2, "writer_count": 2}, "indices below their count"),
        ({"slices": 3}, "batch of 8 rows has no 3 equal slices"),
    ],
)
def test_impossible_shares_are_refused(source, tmp_path, settings, message):
    refused(message, lambda: write(source, tmp_path, **settings))


def test_a_folder_that_cannot_be_written_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    refused("cannot write .*", lambda: write(source, tmp_path / "file" / "targets"))


def test_a_full_disk_is_told_and_leaves_nothing_half_there(source, written, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a file of targets takes 128 KiB at least
    try:
        refused("could not be written .*; check space and permissions", lambda: write(source, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(files(tmp_path)) == {manifest.FILE}
    write(source, tmp_path)
    assert files(tmp_path) == files(written)
