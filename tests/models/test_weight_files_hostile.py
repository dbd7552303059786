"""Damaged and hostile weight files: one line that names the file, never another exception or much memory."""

import itertools
import json
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.models.weight_files import open_weights, write_safetensors
from tests.models.weight_file_makers import (
    array,
    entry,
    gguf_bytes,
    key_value,
    outcome,
    safetensors_bytes,
    string,
    tensor_info,
)

EIGHT = bytes(8)
HUGE = 2**62

SAFETENSORS = {
    "empty": (b"", "holds 0 bytes"),
    "header length beyond the file": (safetensors_bytes({"w": entry()}, EIGHT, length=10_000), "10000 bytes"),
    "header length absurd": (safetensors_bytes({"w": entry()}, EIGHT, length=2**64 - 1), "18446744073709551615 bytes"),
    "header cut": (safetensors_bytes({"w": entry()}, EIGHT)[:30], "announces a header"),
    "data cut": (safetensors_bytes({"w": entry()}, EIGHT)[:-1], "'w' lies at bytes '0' to '8' of 7"),
    "data too long": (safetensors_bytes({"w": entry()}, bytes(9)), "1 bytes after the last tensor"),
    "not JSON": (safetensors_bytes(b'{"w": '), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"w\xff": 1}'), "not valid JSON"),
    "not an object": (safetensors_bytes([1, 2]), "not a JSON object"),
    "space first": (safetensors_bytes(b' {"w": {}}'), "not a JSON object"),
    "deep nesting": (safetensors_bytes(b'{"a":' * 60_000), "not valid JSON"),
    "deep lists": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "endless number": (safetensors_bytes(b'{"a":' + b"9" * 100_000 + b"}"), "not valid JSON"),
    "half a surrogate pair": (safetensors_bytes(b'{"\\ud800": {}}'), "not valid JSON"),
    "name twice": (
        safetensors_bytes(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), EIGHT),
        "the name 'w' twice",
    ),
    "metadata no object": (safetensors_bytes({"__metadata__": ["pt"]}), "not an object of strings"),
    "metadata not strings": (safetensors_bytes({"__metadata__": {"step": 1}}), "not an object of strings"),
    "entry no object": (safetensors_bytes({"w": [1]}), "'w' lacks dtype"),
    "entry incomplete": (safetensors_bytes({"w": {"dtype": "F32", "shape": [2]}}), "'w' lacks dtype"),
    "unknown dtype": (safetensors_bytes({"w": entry("F4")}, EIGHT), "dtype 'F4'; those read are BOOL"),
    "dtype no string": (safetensors_bytes({"w": entry(["F32"])}, EIGHT), "those read are"),
    "negative length": (safetensors_bytes({"w": entry(shape=(-2,))}, EIGHT), "whole numbers"),
    "two negatives": (safetensors_bytes({"w": entry(shape=(-1, -2))}, EIGHT), "whole numbers"),
    "length no integer": (safetensors_bytes({"w": entry(shape=(2.0,))}, EIGHT), "whole numbers"),
    "length a truth value": (safetensors_bytes({"w": entry(shape=(True, 2))}, EIGHT), "whole numbers"),
    "shape overflows to fit": (safetensors_bytes({"w": entry(shape=(2**32, 2**32, 2))}, EIGHT), "does not take its 8"),
    "shape of nothing overflows": (
        safetensors_bytes({"w": entry(shape=(0, HUGE, HUGE), offsets=(0, 0))}),
        "does not take its 0",
    ),
    "too many dimensions": (safetensors_bytes({"w": entry(shape=(1,) * 70 + (2,))}, EIGHT), "does not take its 8"),
    "shape and bytes differ": (safetensors_bytes({"w": entry(shape=(3,))}, EIGHT), "does not take its 8"),
    "offsets backwards": (safetensors_bytes({"w": entry(offsets=(8, 0))}, EIGHT), "'8' to '0'"),
    "offsets three": (safetensors_bytes({"w": entry(offsets=(0, 8, 8))}, EIGHT), "whole numbers"),
    "offsets negative": (safetensors_bytes({"w": entry(offsets=(-8, 0))}, EIGHT), "whole numbers"),
    "offsets beyond": (safetensors_bytes({"w": entry(offsets=(HUGE, HUGE + 8))}, EIGHT), "of 8 bytes of data"),
    "overlap": (safetensors_bytes({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12)), "'w' overlaps"),
    "same bytes twice": (safetensors_bytes({"v": entry(), "w": entry()}, EIGHT), "'w' overlaps"),
    "gap": (safetensors_bytes({"v": entry(), "w": entry(offsets=(9, 17))}, bytes(17)), "'w' leaves unused bytes"),
    "gap at the start": (safetensors_bytes({"w": entry(offsets=(1, 9))}, bytes(9)), "'w' leaves unused bytes"),
    "name of two lines": (safetensors_bytes({"a\nb" * 99: entry(offsets=(0, 9))}, EIGHT), "tensor 'a\\nba\\nb"),
    "bad booleans": (safetensors_bytes({"w": entry("BOOL", (2,), (0, 2))}, b"\1\2"), "neither 0 nor 1"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "renamed archive": (b"PK\x03\x04" + bytes(60), "never loaded"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_are_refused(tmp_path, name):
    content, message = SAFETENSORS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    found = outcome(path)
    assert isinstance(found, str) and message in found


INT32 = struct.pack("<i", 5)
GGUF = {
    "empty": (b"", "the first word"),
    "bad magic": (gguf_bytes(magic=b"GGML"), "not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "version 1 GGUF"),
    "version 9": (gguf_bytes(version=9), "version 9 GGUF"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian GGUF"),
    "tensor count": (gguf_bytes(counts=(HUGE, 0)), f"a list of {HUGE} tensors"),
    "key count": (gguf_bytes(counts=(0, 2**64 - 1)), f"a list of {2**64 - 1} key-values"),
    "key length": (gguf_bytes(values=[struct.pack("<Q", HUGE) + bytes(20)]), "a key"),
    "key not UTF-8": (gguf_bytes(values=[key_value(b"\xff", 5, INT32)]), "a key is not valid UTF-8"),
    "key twice": (gguf_bytes(values=[key_value("a", 5, INT32)] * 2), "the key 'a' twice"),
    "value type": (gguf_bytes(values=[key_value("a", 13, INT32)]), "'a' has the unknown type 13"),
    "string length": (gguf_bytes(values=[key_value("a", 8, struct.pack("<Q", HUGE))]), "the value of 'a'"),
    "string not UTF-8": (gguf_bytes(values=[key_value("a", 8, string(b"\xc3"))]), "the value of 'a' is not valid"),
    "array length": (gguf_bytes(values=[key_value("a", 9, array(4, HUGE, EIGHT))]), "the value of 'a'"),
    "array length wraps": (gguf_bytes(values=[key_value("a", 9, array(10, 2**61 + 1, EIGHT))]), "the value of 'a'"),
    "strings count": (gguf_bytes(values=[key_value("a", 9, array(8, HUGE, EIGHT))]), f"{HUGE} strings"),
    "string in array": (
        gguf_bytes(values=[key_value("a", 9, array(8, 1, struct.pack("<Q", HUGE)))]),
        "string 0 of the value of 'a'",
    ),
    "nested array": (
        gguf_bytes(values=[key_value("a", 9, array(9, 1, array(9, 1, array(4, 0, b""))))]),
        "an array of type 9",
    ),
    "array type": (gguf_bytes(values=[key_value("a", 9, array(77, 1, EIGHT))]), "an array of type 77"),
    "split": (
        gguf_bytes(values=[key_value("split.count", 2, struct.pack("<H", 3))]),
        "llama-gguf-split --merge",
    ),
    "alignment 0": (gguf_bytes(values=[key_value("general.alignment", 4, bytes(4))]), "not a power of two"),
    "alignment 24": (gguf_bytes(values=[key_value("general.alignment", 4, b"\x18\0\0\0")]), "not a power of two"),
    "alignment text": (gguf_bytes(values=[key_value("general.alignment", 8, string("32"))]), "not a power of two"),
    "name length": (gguf_bytes([struct.pack("<Q", HUGE) + bytes(40)]), "the name of a tensor"),
    "name not UTF-8": (gguf_bytes([tensor_info(b"\xff")], data=EIGHT), "the name of a tensor is not valid"),
    "name twice": (gguf_bytes([tensor_info(), tensor_info(offset=32)], data=bytes(64)), "'w' is there twice"),
    "dimensions": (gguf_bytes([tensor_info(shape=(1,) * 5)], data=EIGHT), "'w' has 5 dimensions"),
    "dimensions absurd": (
        gguf_bytes([string("w") + struct.pack("<I", 2**32 - 1) + bytes(40)]),
        "4294967295 dimensions",
    ),
    "shape overflows": (gguf_bytes([tensor_info(shape=(2**32, 2**32, 2))], data=EIGHT), "the shape (2, 4294967296"),
    "shape of nothing overflows": (gguf_bytes([tensor_info(shape=(0, HUGE, HUGE))], data=EIGHT), "impossible for F32"),
    "shape beyond the file": (gguf_bytes([tensor_info(shape=(3,))], data=EIGHT), "'w' goes beyond the end"),
    "no whole blocks": (gguf_bytes([tensor_info(shape=(33,), kind=2)], data=bytes(64)), "impossible for Q4_0"),
    "type unknown": (gguf_bytes([tensor_info(kind=200)], data=EIGHT), "the type number 200"),
    "type removed": (gguf_bytes([tensor_info(kind=4)], data=EIGHT), "the type number 4"),
    "type not read": (gguf_bytes([tensor_info(shape=(256,), kind=16)], data=bytes(99)), "the type IQ2_XXS"),
    "offset beyond": (gguf_bytes([tensor_info(offset=64)], data=EIGHT), "'w' goes beyond the end"),
    "offset wraps": (gguf_bytes([tensor_info(offset=2**64 - 32)], data=EIGHT), "'w' goes beyond the end"),
    "offset not aligned": (gguf_bytes([tensor_info(offset=8)], data=bytes(16)), "no multiple of 32"),
    "overlap": (
        gguf_bytes([tensor_info("v", (16,)), tensor_info(offset=32)], data=bytes(64)),
        "'w' overlaps",
    ),
    "data cut": (gguf_bytes([tensor_info()], data=EIGHT)[:-1], "'w' goes beyond the end"),
    "header cut": (gguf_bytes([tensor_info()])[:40], "goes beyond the end of the file"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_is_refused(tmp_path, name):
    content, message = GGUF[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    found = outcome(path)
    assert isinstance(found, str) and message in found


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(
        weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    )
    return folder


@pytest.fixture
def shards(tmp_path):
    """A folder with two whole shards beside another folder with one more."""
    for name, tensor in (("in/a.safetensors", "a"), ("in/b.safetensors", "b"), ("out/c.safetensors", "c")):
        write_safetensors(tmp_path / name, [(tensor, np.ones(2, np.float32), (2,), np.float32)])
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"c": "../out/c.safetensors"}, "not a file beside it"),
        ({"c": "{out}/c.safetensors"}, "not a file beside it"),
        ({"c": "..\\out\\c.safetensors"}, "not a file beside it"),
        ({"c": "C:c.safetensors"}, "not a file beside it"),
        ({"c": ".."}, "not a file beside it"),
        ({"c": ""}, "not a file beside it"),
        ({"c": "a\0.safetensors"}, "not a file beside it"),
        ({"c": "c" * 5000}, "not there"),
        ({"c": "missing.safetensors"}, "'missing.safetensors', which is not there"),
        ({"a": "a.safetensors", "x": "a.safetensors"}, "'x' should be in a.safetensors and is not"),
        ({"b": "a.safetensors"}, "'a' is in a.safetensors, by the index nowhere"),
        ({"a": "b.safetensors", "b": "a.safetensors"}, "by the index in 'a.safetensors'"),
        ({"a": 1}, "not an object of file names"),
        ([], "not an object of file names"),
        ("[]", "not a JSON object"),
        ("{}", "weight_map is not"),
        ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "the name 'a' twice"),
        ("", "not valid JSON"),
    ],
)
def test_an_index_is_refused(shards, weight_map, message):
    if isinstance(weight_map, dict):
        weight_map = {
            name: shard.replace("{out}", str(shards.parent / "out")) if isinstance(shard, str) else shard
            for name, shard in weight_map.items()
        }
    found = outcome(index(shards, weight_map))
    assert isinstance(found, str) and message in found


def test_a_tensor_in_two_shards_is_refused(shards):
    write_safetensors(
        shards / "b.safetensors", [(name, np.ones(1, np.float32), (1,), np.float32) for name in ("a", "b")]
    )
    found = outcome(index(shards, {"a": "a.safetensors", "b": "b.safetensors"}))
    assert isinstance(found, str) and "'a' is in b.safetensors, by the index in 'a.safetensors'" in found


def test_links_beside_the_index_are_followed(shards):
    (shards / "linked.safetensors").symlink_to(shards.parent / "out" / "c.safetensors")
    found = outcome(index(shards, {"a": "a.safetensors", "c": "linked.safetensors"}))
    assert sorted(found) == ["a", "c"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("loaded",)


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "ckpt", "pkl", "BIN"])
def test_pickle_is_never_loaded(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / f"pytorch_model.{ending}", tmp_path / "renamed.safetensors", tmp_path / "renamed.gguf"):
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError) as caught:
            open_weights(path)
        assert "\n" not in str(caught.value)
        assert path.suffix in (".safetensors", ".gguf") or "save_file(" in str(caught.value)
    assert not (tmp_path / "loaded").exists()


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(UserError, match=r"holds pickle files only; .*save_file\("):
        open_weights(tmp_path)
    (tmp_path / "small.gguf").touch()
    with pytest.raises(UserError, match=r"holds no model.safetensors but 'small.gguf'; name the file"):
        open_weights(tmp_path)


def test_what_is_no_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "notes.txt").touch()
    for path, message in (
        (tmp_path / "pipe.gguf", "not a regular file"),
        (tmp_path / "absent.gguf", "cannot be read .No such file"),
        (tmp_path / ("x" * 5000), "cannot be read .File name too long"),
        (tmp_path, "not a regular file"),
        (tmp_path / "notes.txt", "not a weight file by its name"),
    ):
        with pytest.raises(UserError, match=message):
            open_weights(path)


def test_a_file_cut_while_it_is_open_is_one_line(tmp_path):
    (path,) = write_safetensors(tmp_path / "w.safetensors", [("w", np.ones(5000, np.float32), (5000,), np.float32)])
    with open_weights(path) as source:
        os.truncate(path, 10_000)
        with pytest.raises(UserError, match="'w' is cut off"):
            source.read("w")


# Fuzzing: whole files changed a little, and headers made up.
EXAMPLES = 150
FLOATS = np.arange(6, dtype=np.float32).tobytes()
WHOLE_SAFETENSORS = safetensors_bytes(
    {
        "__metadata__": {"format": "pt"},
        "w": entry(shape=(2, 3), offsets=(0, 24)),
        "b": entry("BF16", (4,), (24, 32)),
        "e": entry("I64", (0, 2), (32, 32)),
        "s": entry("U8", (), (32, 33)),
    },
    FLOATS + bytes(range(9)),
)
DATA_START = len(WHOLE_SAFETENSORS) - 33
WHOLE_GGUF = gguf_bytes(
    [tensor_info("w", (3, 2)), tensor_info("q", (32, 2), 3, 32), tensor_info("k", (256,), 14, 96)],
    [
        key_value("general.architecture", 8, string("llama")),
        key_value("tokens", 9, array(8, 3, string("a") + string("bc") + string(""))),
        key_value("scores", 9, array(6, 3, bytes(12))),
        key_value("flag", 7, b"\1"),
        key_value("heads", 4, b"\x09\0\0\0"),
    ],
    FLOATS + bytes(8) + bytes(range(40)) + bytes(24) + bytes(range(210)),
)
bytewise = st.tuples(st.integers(0, 10_000), st.integers(0, 255))
changes = st.one_of(
    st.lists(st.tuples(st.just("set"), bytewise), min_size=1, max_size=4),
    st.lists(st.tuples(st.just("cut"), bytewise), min_size=1, max_size=1),
    st.lists(st.tuples(st.sampled_from(["insert", "remove", "set"]), bytewise), min_size=1, max_size=4),
)


def changed(content, edits):
    content = bytearray(content)
    for kind, (where, value) in edits:
        where %= max(1, len(content))
        if kind == "cut":
            del content[where:]
        elif kind == "insert":
            content[where:where] = bytes([value])
        elif kind == "remove":
            del content[where : where + 1]
        elif content:
            content[where] = value
    return bytes(content)


def join(arrays):
    return b"".join(array.tobytes() for array in arrays.values())


@settings(max_examples=EXAMPLES)
@given(changes)
def test_changed_safetensors_are_whole_or_refused(tmp_path_factory, edits):
    content = changed(WHOLE_SAFETENSORS, edits)
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    found = outcome(path)
    if not isinstance(found, str):  # every byte of the data belongs to one tensor, in order
        assert (
            content.endswith(join(found)) and len(join(found)) == len(content) - 8 - struct.unpack("<Q", content[:8])[0]
        )
    if content == WHOLE_SAFETENSORS:
        assert join(found) == WHOLE_SAFETENSORS[DATA_START:]


@settings(max_examples=EXAMPLES)
@given(changes)
def test_changed_gguf_is_whole_or_refused(tmp_path_factory, edits):
    content = changed(WHOLE_GGUF, edits)
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    path.write_bytes(content)
    found = outcome(path)
    if not isinstance(found, str):
        assert len(found) <= 3 and sum(array.size for array in found.values()) <= 8 * len(content)


def test_no_truncation_passes(tmp_path):
    for name, whole in (("w.safetensors", WHOLE_SAFETENSORS), ("w.gguf", WHOLE_GGUF)):
        (tmp_path / name).write_bytes(whole)
        assert not isinstance(outcome(tmp_path / name), str)
        for length in range(0, len(whole), 3):
            (tmp_path / name).write_bytes(whole[:length])
            assert isinstance(outcome(tmp_path / name), str)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**400]),
    st.floats(),
    st.sampled_from(["F32", "BOOL", "", "\ud800", "__metadata__", "a\nb"]),
)
nested = st.recursive(
    values, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["w", "shape", "dtype"]), inner)
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "I64", "BOOL"]) | nested,
        "shape": st.lists(st.integers(0, 3), max_size=3) | nested,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | nested,
    },
)


@settings(max_examples=EXAMPLES)
@given(st.dictionaries(st.sampled_from(["w", "v", "\ud800", "__metadata__"]), entries | nested, max_size=3))
def test_any_header_is_whole_or_refused(tmp_path_factory, header):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    data = bytes(24)
    path.write_bytes(safetensors_bytes(header, data))
    found = outcome(path)
    assert isinstance(found, str) or len(join(found)) == len(data)


kinds = st.sampled_from([*range(32), 200, 2**32 - 1])
lengths = st.sampled_from([0, 1, 2, 32, 64, 256, 2**31, 2**62, 2**63, 2**64 - 32, 2**64 - 1])


@settings(max_examples=EXAMPLES)
@given(
    st.lists(st.tuples(st.lists(lengths, max_size=5), kinds, lengths), max_size=3),
    st.lists(st.tuples(kinds, kinds, lengths), max_size=3),
)
def test_any_gguf_header_is_whole_or_refused(tmp_path_factory, infos, values):
    path = tmp_path_factory.getbasetemp() / "header.gguf"
    names = itertools.count()
    path.write_bytes(
        gguf_bytes(
            [tensor_info(f"t{next(names)}", shape, kind, offset) for shape, kind, offset in infos],
            [key_value(f"k{next(names)}", kind, array(inner, count, bytes(64))) for kind, inner, count in values],
            bytes(2000),
        )
    )
    found = outcome(path)
    assert isinstance(found, str) or sum(array.nbytes for array in found.values()) <= 8 * 2000
