"""Training batches end to end: shapes, processes, exact restore, mixtures, errors."""

import json

import numpy as np
import pytest

from fastlm.data import pipeline, tokenizers
from fastlm.errors import UserError

TOKENIZER = tokenizers.make("bytes")
MODES = [
    {"mode": "packed", "packing": "concat"},
    {"mode": "packed", "packing": "first_fit"},
    {"mode": "stream"},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two JSONL files: 40 documents of mixed length in `a`, 24 in `b`, told apart by their letters."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, letters, count in (("a", "abcde", 40), ("b", "vwxyz", 24)):
        texts = ["".join(rng.choice(list(letters), size=rng.integers(1, 120))) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def batches(corpus, *, name="a", count=0, state=None, **settings):
    defaults = {"split": "all", "length": 32, "batch_size": 8, "seed": 3, "prefetch": 0}
    sources = name if isinstance(name, list) else f"jsonl:{corpus / name}.jsonl"
    iterator = pipeline.training_batches(sources, TOKENIZER, **(defaults | settings))
    if state is not None:
        iterator.set_state(state)
    return [next(iterator) for _ in range(count)] if count else iterator


def same(left, right):
    return len(left) == len(right) and all(
        set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a) for a, b in zip(left, right)
    )


@pytest.mark.parametrize("settings", MODES)
def test_keys_shapes_and_types(corpus, settings):
    (batch,) = batches(corpus, count=1, **settings)
    integers = {"tokens", "targets", "segment_ids", "positions", "document"}
    assert set(batch) == integers | {"loss_mask"} | ({"reset"} if settings["mode"] == "stream" else set())
    for name in integers:
        assert batch[name].dtype == np.int32 and batch[name].shape == (8, 32)
    assert batch["loss_mask"].dtype == np.float32
    if "reset" in batch:
        assert batch["reset"].dtype == bool and batch["reset"].shape == (8,) and batch["reset"].all()


def test_a_document_opens_with_bos_and_ends_with_eos(corpus):
    (batch,) = batches(corpus, count=1, batch_size=1, length=4000)
    starts = batch["positions"] == 0
    assert (batch["tokens"][starts] == TOKENIZER.bos).sum() >= 2
    assert (batch["targets"] == TOKENIZER.eos).sum() >= 2
    inside = batch["targets"][:, :-1] != TOKENIZER.eos
    assert np.array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])


@pytest.mark.parametrize("settings", MODES)
def test_seed_decides_everything(corpus, settings):
    assert same(batches(corpus, count=4, **settings), batches(corpus, count=4, **settings))
    assert not same(batches(corpus, count=4, **settings), batches(corpus, count=4, **settings | {"seed": 4}))


@pytest.mark.parametrize("settings", MODES)
@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_processes(corpus, settings, processes):
    alone = batches(corpus, count=5, **settings)
    parts = [
        batches(corpus, count=5, process_index=index, process_count=processes, **settings) for index in range(processes)
    ]
    joined = [{name: np.concatenate([batch[name] for batch in step]) for name in step[0]} for step in zip(*parts)]
    assert same(alone, joined)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("steps", [0, 1, 7, 23])
@pytest.mark.parametrize("settings", MODES)
def test_restore_is_exact(corpus, settings, steps, prefetch):
    mixture = [(f"jsonl:{corpus / 'a'}.jsonl", 0.6), (f"jsonl:{corpus / 'b'}.jsonl", 0.4)]
    straight = batches(corpus, name=mixture, prefetch=prefetch, **settings)
    for _ in range(steps):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    expected = [next(straight) for _ in range(4)]
    restored = batches(corpus, name=mixture, prefetch=prefetch, **settings)
    for _ in range(5):  # where it was before must not matter
        next(restored)
    restored.set_state(state)
    assert same(expected, [next(restored) for _ in range(4)])
    straight.close()
    restored.close()


@pytest.mark.parametrize("settings", MODES)
def test_restore_on_another_number_of_processes(corpus, settings):
    two = [batches(corpus, process_index=index, process_count=2, **settings) for index in range(2)]
    for iterator in two:
        for _ in range(6):
            next(iterator)
    state = {shard: entry for iterator in two for shard, entry in iterator.get_state().items()}
    assert sorted(state) == [str(shard) for shard in range(8)]
    expected = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in [(next(two[0]), next(two[1]))]]
    assert same(expected, batches(corpus, count=1, state=state, **settings))
    quarter = batches(corpus, count=1, state=state, process_index=3, process_count=4, **settings)
    assert same(quarter, [{name: value[6:] for name, value in expected[0].items()}])


def test_shards_own_different_documents(corpus):
    owned = [
        {
            int(document)
            for batch in batches(corpus, count=30, process_index=index, process_count=4)
            for document in batch["document"].ravel()
        }
        for index in range(4)
    ]
    assert set.union(*owned) == set(range(40))
    assert sum(map(len, owned)) == 40


@pytest.mark.parametrize("settings", MODES)
def test_mixture_shares_count_tokens(corpus, settings):
    mixture = [(f"jsonl:{corpus / 'a'}.jsonl", 3), (f"jsonl:{corpus / 'b'}.jsonl", 1)]
    documents = [batch["document"] for batch in batches(corpus, name=mixture, count=150, **settings)]
    real = np.concatenate([document[document >= 0] for document in documents])
    assert abs((real < 40).mean() - 0.75) < 0.03
    assert real.max() == 63  # `b` is numbered after `a`


@pytest.mark.parametrize("shards", [1, 4, 8])
def test_every_packed_batch_holds_the_shares(corpus, shards):
    mixture = [(f"jsonl:{corpus / 'a'}.jsonl", 0.5), (f"jsonl:{corpus / 'b'}.jsonl", 0.5)]
    for batch in batches(corpus, name=mixture, count=40, shards=shards):
        assert 3 <= (batch["document"][:, 0] < 40).sum() <= 5


def test_shards_are_chosen_to_fit(corpus):
    assert sorted(batches(corpus, batch_size=12).get_state()) == ["0", "1", "2", "3"]
    assert sorted(batches(corpus, batch_size=7).get_state()) == ["0"]
    assert len(batches(corpus, batch_size=16, split="all[:5]").get_state()) == 4


def test_length_one_and_single_document(corpus):
    (batch,) = batches(corpus, count=1, split="all[:1]", length=1, batch_size=2)
    assert batch["loss_mask"].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "pakced"}, "unknown mode 'pakced'; did you mean 'packed'"),
        ({"packing": "concta"}, "unknown packing 'concta'; did you mean 'concat'"),
        ({"shards": 3}, "batch_size 8 is no multiple of shards 3"),
        ({"process_count": 3}, "shards 8 is no multiple of the 3 processes"),
        ({"shards": 8, "split": "all[:5]"}, "5 document.s. for 8 shards"),
        ({"length": 0}, "length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"name": []}, "no data source"),
        ({"name": [("state_of_the_union", 0.0)]}, "share of source 'state_of_the_union' must be positive"),
        ({"split": "nosuch"}, "has no split 'nosuch'"),
    ],
)
def test_what_does_not_fit_is_an_error(corpus, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        batches(corpus, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 16}, "length was 32, now it is 16"),
        ({"batch_size": 16}, "batch_size was 8, now it is 16"),
        ({"name": "b"}, "sources was"),
        ({"seed": 1}, "seed was 3, now it is 1"),
        ({"mode": "stream"}, "mode was packed, now it is stream"),
    ],
)
def test_a_state_of_other_data_is_refused(corpus, change, message):
    state = batches(corpus).get_state()
    with pytest.raises(UserError, match=message):
        batches(corpus, state=state, **change)


def test_a_state_without_a_shard_is_refused(corpus):
    state = batches(corpus, process_index=0, process_count=2).get_state()
    with pytest.raises(UserError, match="but not 4"):
        batches(corpus, state=state)


def test_an_error_in_the_background_reaches_the_caller(corpus, monkeypatch):
    iterator = batches(corpus, prefetch=2)
    monkeypatch.setattr("fastlm.data.packing.build_row", lambda *_: (_ for _ in ()).throw(UserError("row is bad")))
    with pytest.raises(UserError, match="row is bad"):
        next(iterator)
    iterator.close()


def test_closed_means_closed(corpus):
    iterator = batches(corpus, prefetch=2)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
