"""Data sets of the long-range suite: what is generated is right, and what is split stays apart."""

import collections
import functools
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data import examples, tokenizers
from fastlm.data.builders import digits, list_ops, pathfinder, retrieval_bytes, state_of_the_union, text_bytes
from fastlm.data.builders import pathfinder_scenes as geometry
from fastlm.errors import UserError

SPLITS = ("train", "validation", "test")


def first(rows, count):
    return list(itertools.islice(rows, count))


def evaluate(symbols):
    """The value of an expression read from an iterator, and how deep it is nested."""
    symbol = next(symbols)
    if symbol.isdigit() or symbol == "]":
        return symbol, 0
    arguments, depth = [], 0
    while (argument := evaluate(symbols))[0] != "]":
        arguments.append(int(argument[0]))
        depth = max(depth, argument[1])
    assert 2 <= len(arguments) <= 10
    value = {"N": np.min, "X": np.max, "D": np.median, "S": lambda values: np.sum(values) % 10}[symbol](arguments)
    return str(int(value)), depth + 1


@pytest.mark.parametrize("size", list_ops.SIZES.values(), ids=list_ops.SIZES)
def test_list_ops_labels_are_the_values(size):
    rows = first(list_ops.rows(size, "train"), 60)
    depths = []
    for row in rows:
        symbols = iter(row["text"])
        value, depth = evaluate(symbols)
        assert value == row["label"] and next(symbols, None) is None, row
        assert size.shortest <= len(row["text"]) <= size.longest
        depths.append(depth)
    assert 5 <= max(depths) <= 9  # digits stand at the tenth level


def test_list_ops_is_the_same_everywhere_and_no_digit_is_the_answer():
    size = list_ops.SIZES["short"]
    rows = first(list_ops.rows(size, "test"), 400)
    assert rows[:10] == first(list_ops.rows(size, "test"), 10)
    assert rows[0]["text"].startswith("X4S14]2D1736SN05N72N9345") and rows[0]["label"] == "7"
    counts = collections.Counter(row["label"] for row in rows)
    assert set(counts) == set("0123456789") and max(counts.values()) < 0.2 * len(rows)
    texts = {row["text"] for row in rows}
    assert len(texts) == 400 and not texts & {row["text"] for row in first(list_ops.rows(size, "train"), 400)}


@pytest.fixture(scope="module")
def scenes():
    return first(pathfinder.scenes("train"), 24)


def test_pathfinder_discs_are_on_one_path_or_on_two(scenes):
    for scene, label in scenes:
        ends = [(path[0][:2], path[-1][2:]) for path in scene.paths[:2]]
        on = [[number for number, two in enumerate(ends) if disc in two] for disc in scene.discs]
        assert (on[0] == on[1]) == (label == "connected") and len(on[0]) == len(on[1]) == 1
        assert scene.discs[0] != scene.discs[1]
    assert collections.Counter(label for _, label in scenes) == {"connected": 12, "apart": 12}


def test_pathfinder_paths_are_dashes_that_keep_clear_of_others(scenes):
    cell = 2 / geometry.CELLS  # of the grid, on which distances are kept
    for scene, _ in scenes:
        lengths = [len(path) for path in scene.paths]
        assert lengths[:2] == [geometry.LONG] * 2 and set(lengths[2:]) <= {geometry.SHORT}
        for path in scene.paths:
            for one, other in itertools.pairwise(path):
                assert math.dist(one[2:], other[:2]) == pytest.approx(geometry.GAP)
                assert math.dist(other[:2], other[2:]) == pytest.approx(geometry.DASH)
        for one, other in itertools.combinations(scene.paths, 2):
            near = min(
                math.dist(p, q) for a in one for p in geometry.points(a) for b in other for q in geometry.points(b)
            )
            assert near > geometry.CLEARANCE - cell > geometry.GAP


def reaches(image, discs):
    """Whether lit pixels that touch lead from one disc to the other."""
    lit = {(int(y), int(x)) for y, x in zip(*np.nonzero(image > 5))}
    (x, y), (far_x, far_y) = discs
    seen = todo = {(int(y), int(x))}
    while todo:
        around = {(y + down, x + right) for y, x in todo for down in (-1, 0, 1) for right in (-1, 0, 1)}
        todo = around & lit - seen
        seen = seen | todo
    return (int(far_y), int(far_x)) in seen


def test_pathfinder_images_can_be_followed(scenes):
    """By the crudest tracing in most of them; some dashes touch others, some hardly show."""
    images = [geometry.render(scene) for scene, _ in scenes]
    right = [reaches(image, scene.discs) == (label == "connected") for image, (scene, label) in zip(images, scenes)]
    assert np.mean(right) > 0.75
    for image, (scene, _) in zip(images, scenes):
        assert image.shape == (32, 32) and image.dtype == np.uint8
        assert all(image[int(y), int(x)] == 255 for x, y in scene.discs)
        assert 0.1 < np.mean(image > 0) < 0.5


def test_pathfinder_cannot_be_told_by_how_far_the_discs_are_apart(scenes):
    for (apart, no), (connected, yes) in zip(scenes[::2], scenes[1::2]):
        assert (no, yes) == ("apart", "connected")
        assert abs(math.dist(*apart.discs) - math.dist(*connected.discs)) < geometry.SAME_DISTANCE


def test_pathfinder_is_the_same_everywhere(scenes):
    again = first(pathfinder.scenes("train"), 4)
    assert again == scenes[:4]
    assert first(pathfinder.scenes("test"), 2) != scenes[:2]
    assert again[0][0].paths[0][0] == pytest.approx((15.68, 4.675, 16.963, 3.561), abs=1e-3)


def test_digits_become_numbers_in_row_order(tmp_path, monkeypatch):
    everything = digits.rows
    monkeypatch.setattr(digits, "rows", lambda split: itertools.islice(everything(split), 8))
    rows = examples.load("digits", "validation", data_dir=tmp_path)
    assert rows.fields == ("image", "label") and len(rows) == 8
    tokenizer = tokenizers.make("numbers", vocab_size=257)
    found = {(row["label"], tokenizer.encode(row["image"]).tobytes()) for row in rows}
    assert found == {
        (row["label"], row["image"].astype(np.int32).tobytes()) for row in first(everything("validation"), 8)
    }


def test_digits_are_in_one_split_each():
    rows = {split: list(digits.rows(split)) for split in SPLITS}
    assert [len(rows[split]) for split in SPLITS] == [8000, 1000, 1000]
    images = [row["image"].tobytes() for part in rows.values() for row in part]
    assert len(set(images)) == 10_000
    for part in rows.values():
        counts = collections.Counter(row["label"] for row in part)
        assert set(counts) == set("0123456789") and max(counts.values()) < 0.13 * len(part)


def test_images_of_a_data_set_are_numbers(tmp_path):
    """Colours become gray, one channel none; what has no fixed shape is left out."""
    import tensorflow_datasets as tfds

    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 10, 10]]], np.uint8)

    class Images(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "colour": tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8),
                        "gray": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8, encoding="zlib"),
                        "free": tfds.features.Tensor(shape=(None, 2), dtype=np.uint8),
                        "label": tfds.features.ClassLabel(names=["no", "yes"]),
                    }
                ),
            )

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"colour": colours, "gray": colours[..., 1:2], "free": colours[:, :, 0], "label": 1}

    Images(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    (row,) = examples.load("images", "train", data_dir=tmp_path)
    assert row == {"colour": "76 150 29 10", "gray": "0 255 0 10", "label": 1}


def test_numbers_are_tokens():
    tokenizer = tokenizers.make("numbers", vocab_size=257)
    ids = tokenizer.encode(" 0 255\n17 ")
    assert ids.tolist() == [0, 255, 17] and ids.dtype == np.int32
    assert tokenizer.decode([256, *ids, 256]) == "0 255 17" and tokenizer.encode("").tolist() == []
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.pad) == (257, 256, 256, 256)
    assert [part.tolist() for part in tokenizer.encode_with_offsets("3  14")] == [[3, 14], [0, 3], [1, 5]]
    again = tokenizers.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint and again.encode("9").tolist() == [9]
    assert again.fingerprint != tokenizers.make("numbers", vocab_size=11).fingerprint


@pytest.mark.parametrize("word", ["256", "-1", "a", "1.5", "9" * 30])
def test_what_is_no_number_is_named(word):
    with pytest.raises(UserError, match=f"from 0 to 255 .*, not '{word[:20]}'"):
        tokenizers.make("numbers", vocab_size=257).encode(f"1 {word} 2")
    with pytest.raises(UserError, match="vocab_size of at least 2"):
        tokenizers.make("numbers", vocab_size=0)


@functools.cache
def address_texts(split):
    return [" ".join(address["text"].split()) for address in state_of_the_union.addresses(split)]


def addresses_of(passages, split):
    """Which addresses of a split the passages stand in."""
    return {next(number for number, text in enumerate(address_texts(split)) if p in text) for p in passages}


def test_text_bytes():
    rows = {split: list(text_bytes.rows(split)) for split in ("validation", "test")}
    for split, part in rows.items():
        lengths = [len(row["text"].encode()) for row in part]
        assert len(part) > 300 and min(lengths) >= 1000 and 3000 < max(lengths) <= 4000
        assert len(addresses_of([row["text"] for row in part[::40]], split)) > 3
        assert max(collections.Counter(row["era"] for row in part).values()) < 0.3 * len(part)
    assert not {row["text"] for row in rows["test"]} & {row["text"] for row in rows["validation"]}
    assert rows["test"][:20] == first(text_bytes.rows("test"), 20)


def test_retrieval_bytes():
    rows = list(retrieval_bytes.rows("test"))
    assert rows[:9] == first(retrieval_bytes.rows("test"), 9) and len(rows) > 800
    for same, different in random.Random(0).sample(list(zip(rows[::2], rows[1::2])), 20):
        assert (same["label"], different["label"]) == ("same", "different") and same["first"] == different["first"]
        assert len(addresses_of([same["first"], same["second"]], "test")) == 1
        assert len(addresses_of([different["first"], different["second"]], "test")) == 2
        assert same["first"] != same["second"]
    assert max(len((row["first"] + row["second"]).encode()) for row in rows) <= 4000 - 3
    # Seconds of both labels are of the same addresses equally often, or a second alone would tell.
    found = {text: addresses_of([text], "test") for text in {row["second"] for row in rows}}
    count = lambda label: collections.Counter(min(found[row["second"]]) for row in rows if row["label"] == label)
    assert count("same") == count("different")


@given(st.lists(st.integers(0, 5), min_size=4, max_size=40), st.integers(0, 99))
def test_exchanged_leaves_nothing_in_its_place(numbers, seed):
    if 2 * max(collections.Counter(numbers).values()) > len(numbers):
        with pytest.raises(ValueError, match="more than half"):
            retrieval_bytes.exchanged(numbers, random.Random(seed))
        return
    order = retrieval_bytes.exchanged(numbers, random.Random(seed))
    assert sorted(order) == sorted(numbers) and all(a != b for a, b in zip(order, numbers))
