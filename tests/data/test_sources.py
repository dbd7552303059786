"""Sources: what ships, what is on disk, the user's files, and every way to get one wrong."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import pickle
import shutil
import socket
import sys

import pytest

from fastlm.data import prepare, sources, tfds_documents
from fastlm.data.builders import old_testament, python_stdlib
from fastlm.errors import UserError

SPLITS = ("train", "validation", "test")


def load(spec, split="all", **settings):
    return sources.load(spec, split, **settings)


@pytest.mark.parametrize("spec", ["state_of_the_union", "python_stdlib", "old_testament_en", "old_testament_es"])
def test_shipped_splits_are_disjoint_and_whole(spec):
    texts = {split: list(load(spec, split)) for split in SPLITS}
    sets = {split: set(texts[split]) for split in SPLITS}
    assert all(all(texts[split]) for split in SPLITS)
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    total = sum(map(len, texts.values()))
    assert 0.04 < len(texts["test"]) / total < 0.15 and 0.04 < len(texts["validation"]) / total < 0.15


def test_state_of_the_union_is_split_by_address():
    lengths = {split: len(load("state_of_the_union", split)) for split in SPLITS}
    assert lengths == {"train": 160, "validation": 20, "test": 21}
    assert "Fellow-Citizens" in load("state_of_the_union", "train")[0]


def test_old_testament_is_one_document_a_chapter():
    english, spanish = (load(f"old_testament_{code}", "train") for code in ("en", "es"))
    assert len(english) == len(spanish)
    assert any(text.startswith("In the beginning, God created") for text in english)
    assert any(text.startswith("EN el principio crió Dios") for text in spanish)
    books = {split: {verse.book for verse in old_testament.verses(split)} for split in SPLITS}
    assert sum(map(len, books.values())) == len(set.union(*books.values())) == 39


def test_standard_library_is_of_this_interpreter_and_without_tests(data_dir):
    load("python_stdlib", "train")
    (folder,) = (data_dir / "python_stdlib").iterdir()
    assert "{}.{}.{}".format(*sys.version_info) in folder.name
    test = set(load("python_stdlib", "test"))
    root = os.path.dirname(json.__file__)
    for name in ("decoder.py", "encoder.py", "scanner.py", "tool.py"):
        with open(os.path.join(root, name), encoding="utf-8") as file:
            assert (file.read() in test) == (python_stdlib.split_of(f"json/{name}") == "test")
    paths = list(load("python_stdlib#path", "train"))
    assert not any(part in path.split("/") for path in paths for part in ("test", "tests", "site-packages"))
    assert "ast.py" in paths or python_stdlib.split_of("ast.py") != "train"


def test_documents_pickle_and_keep_their_identity():
    documents = load("old_testament_en", "validation")
    documents[0]
    copy = pickle.loads(pickle.dumps(documents))
    assert copy[3] == documents[3] and copy.fingerprint == documents.fingerprint
    assert load("old_testament_en", "validation").fingerprint == documents.fingerprint
    assert load("old_testament_en", "test").fingerprint != documents.fingerprint
    assert load("old_testament_es", "validation").fingerprint != documents.fingerprint


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("train[:10%]", slice(0, 16)),
        ("train[50%:]", slice(80, None)),
        ("train[3:5]", slice(3, 5)),
        ("train[-2:]", slice(-2, None)),
        ("train[:]", slice(None)),
    ],
)
def test_slices(split, chosen):
    whole = load("state_of_the_union", "train")
    part = load("state_of_the_union", split)
    assert list(part) == list(whole)[chosen]
    assert (part.fingerprint == whole.fingerprint) == (len(part) == len(whole))
    assert part.fingerprint != load("state_of_the_union", "train[1:3]").fingerprint


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("stat_of_the_union", "train", "did you mean 'state_of_the_union'"),
        ("state_of_the_union", "tset", "has no split 'tset'; did you mean 'test'"),
        ("state_of_the_union", "train[:x]", "is not understood"),
        ("state_of_the_union", "train[5:5]", "holds no document"),
        ("state_of_the_union#txt", "train", "has no text field 'txt'.*president"),
        ("state_of_the_union#year", "train", "has no text field 'year'"),
        ("old_testament", "train", "configurations: name one of 'old_testament/en', 'old_testament/es'"),
    ],
)
def test_a_wrong_name_is_an_error(spec, split, message):
    load("old_testament_en", "test"), load("old_testament_es", "test")
    with pytest.raises(UserError, match=message) as raised:
        load(spec, split)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["lm1b", "wiki40b/en", "c4/en", "tiny_shakespeare"])
def test_a_public_data_set_not_on_disk_fails_at_once_and_names_the_command(name, tmp_path, monkeypatch):
    """TFDS itself would ask the network, for minutes where there is none."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(UserError) as raised:
        load(name, "train", data_dir=tmp_path)
    assert f"python -m fastlm.data.prepare {name} --data_dir {tmp_path}" in str(raised.value)
    assert not list(tmp_path.iterdir())  # no partial folder


@pytest.fixture
def public(tmp_path, data_dir):
    """A data set in the folders of a public one with configurations and versions."""
    load("old_testament_en", "test")
    shutil.copytree(data_dir / "old_testament", tmp_path / "old_testament")
    version = tmp_path / "old_testament" / "en"
    return tmp_path, version


def test_a_prepared_data_set_is_read_by_its_tfds_name(public):
    root, version = public
    documents = load("old_testament/en", "test", data_dir=root)
    assert list(documents) == list(load("old_testament_en", "test"))
    newer = version / "1.10.0"
    shutil.copytree(version / "1.0.0", newer)
    shutil.copytree(version / "1.0.0", version / "1.9.0")
    (version / "2.0.0").mkdir()  # without dataset_info.json: no data set
    assert tfds_documents.find_folder("old_testament/en", root) == newer


def change_info(folder, **changes):
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_data_set_in_tfrecord_is_an_error_with_the_converting_command(public):
    root, version = public
    change_info(version / "1.0.0", fileFormat="tfrecord")
    with pytest.raises(UserError, match="stored as tfrecord") as raised:
        load("old_testament/en", "test", data_dir=root)
    assert f"python -m fastlm.data.prepare old_testament/en --data_dir {root}" in str(raised.value)


def test_a_damaged_data_set_is_an_error(public):
    root, version = public
    (version / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="no readable TFDS data set"):
        load("old_testament/en", "test", data_dir=root)


def test_prepare_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", "old_testament_es", "--data_dir", str(tmp_path)])
    prepare.main()
    assert "old_testament_es: " in capsys.readouterr().out
    assert len(load("old_testament/es", "test", data_dir=tmp_path)) > 50
    assert prepare.prepare("old_testament/es", tmp_path) == tfds_documents.find_folder("old_testament/es", tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", "no_such_data_set", "--data_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        prepare.main()
    assert exit_.value.code == 2 and "no_such_data_set" in capsys.readouterr().err


def write_texts(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")


def test_text_files_are_documents(tmp_path):
    write_texts(tmp_path / "a", ["one", "two é", ""])
    write_texts(tmp_path / "a" / "deep", ["three"])
    assert list(load(f"text:{tmp_path}/a/*.txt")) == ["one", "two é"]
    assert sorted(load(f"text:{tmp_path}/a/**/*.txt")) == ["one", "three", "two é"]


def test_many_text_files_split_by_file_and_stay_where_they_are(tmp_path):
    write_texts(tmp_path, [f"text {number}" for number in range(300)])
    splits = {split: set(load(f"text:{tmp_path}/*.txt", split)) for split in SPLITS}
    assert sum(map(len, splits.values())) == 300 == len(set.union(*splits.values()))
    assert 5 <= len(splits["test"]) <= 30 and 5 <= len(splits["validation"]) <= 30
    (tmp_path / "more.txt").write_text("more")
    for split in SPLITS:
        assert splits[split] == set(load(f"text:{tmp_path}/*.txt", split)) - {"more"}


@pytest.mark.parametrize("text", ["".join(f"line {i} é\n" for i in range(200)), "é" * 1000, "ab", "x\n" * 11])
def test_few_text_files_are_cut_at_line_borders(tmp_path, text):
    write_texts(tmp_path, [text])
    parts = []
    for split in SPLITS:
        try:
            parts += list(load(f"text:{tmp_path}/*.txt", split))
        except UserError as error:
            assert "falls into split" in str(error)
            parts.append("")
    assert "".join(parts) == text
    assert len(parts[0]) >= 0.85 * len(text)
    if "line" in text:
        assert all(part.endswith("\n") for part in parts)


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files(tmp_path, suffix, opener):
    with opener(tmp_path / f"a.txt{suffix}", "wt", encoding="utf-8") as file:
        file.write("packed é")
    with opener(tmp_path / f"b.jsonl{suffix}", "wt", encoding="utf-8") as file:
        file.write('{"text": "one"}\n{"text": "two"}\n')
    assert list(load(f"text:{tmp_path}/a.txt{suffix}")) == ["packed é"]
    assert list(load(f"jsonl:{tmp_path}/b.jsonl{suffix}")) == ["one", "two"]
    (tmp_path / f"bad.txt{suffix}").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"bad.txt.* does not decompress"):
        load(f"text:{tmp_path}/bad.txt{suffix}")
    (tmp_path / f"bad.jsonl{suffix}").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"bad.jsonl.* does not decompress"):
        load(f"jsonl:{tmp_path}/bad.jsonl{suffix}")


def test_the_fingerprint_follows_the_content(tmp_path):
    write_texts(tmp_path, ["same", "text"])
    before = load(f"text:{tmp_path}/*.txt").fingerprint
    assert load(f"text:{tmp_path}/*.txt").fingerprint == before
    (tmp_path / "001.txt").write_text("tixt")  # the same size
    assert load(f"text:{tmp_path}/*.txt").fingerprint != before


def test_the_fingerprint_is_that_of_the_same_files_elsewhere(tmp_path):
    for folder in ("here", "there"):
        write_texts(tmp_path / folder, ["same", "text"])
        (tmp_path / folder / "lines.jsonl").write_text('{"text": "a"}\n')
    for spec in ("text:{}/*.txt", "jsonl:{}/*.jsonl"):
        here, there = (load(spec.format(tmp_path / folder)).fingerprint for folder in ("here", "there"))
        assert here == there


def test_json_lines(tmp_path):
    lines = ['{"text": "one", "body": "1"}', "", '{"body": "2", "text": "zwei é"}', '  {"text": "\\u00e9"}  ']
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "windows"}\r\n\r\n{"text": ""}\r\n')
    (tmp_path / "empty.jsonl").write_text("")
    documents = load(f"jsonl:{tmp_path}/*.jsonl")
    assert list(documents) == ["one", "zwei é", "é", "windows", ""]
    assert documents[1] == "zwei é" and pickle.loads(pickle.dumps(documents))[3] == "windows"
    assert load(f"jsonl:{tmp_path}/a.jsonl#body")[0] == "1"


def test_json_lines_split_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(400)))
    splits = {split: list(load(f"jsonl:{tmp_path}/a.jsonl", split)) for split in SPLITS}
    assert sorted(itertools.chain(*splits.values()), key=int) == [str(i) for i in range(400)]
    assert 8 <= len(splits["test"]) <= 35 and 8 <= len(splits["validation"]) <= 35
    assert splits["test"] != [str(i) for i in range(len(splits["test"]))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a.jsonl:3 is no JSON \(.* at column"),
        (b'["text"]', r"a.jsonl:3 is no JSON object but a list"),
        (b'{"txt": "a"}', r"a.jsonl:3 has no field 'text'; did you mean 'txt'"),
        (b'{"text": 5}', r"a.jsonl:3: field 'text' is no text but int"),
        (b'{"text": "\\ud800"}', r"a.jsonl:3: .*surrogate"),
        (b'{"text": "\xff"}', r"a.jsonl is not valid UTF-8 at byte 28 \(0xff\)"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    documents = load(f"jsonl:{tmp_path}/a.jsonl")
    assert documents[0] == "fine"
    with pytest.raises(UserError, match=message) as raised:
        documents[1]
    assert "\n" not in str(raised.value)


def test_invalid_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not valid UTF-8 at byte 1 \(0xe9\).*iconv"):
        load(f"text:{tmp_path}/latin.txt")[0]
    # The offset counts from the start of the file, in a part of it too.
    (tmp_path / "late.txt").write_bytes(b"line\n" * 199 + b"li\xff\n")
    with pytest.raises(UserError, match="at byte 997"):
        list(load(f"text:{tmp_path}/late.txt", "test"))


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_no_files_or_nothing_in_them(tmp_path, kind):
    with pytest.raises(UserError, match=f"no file matches {kind}:"):
        load(f"{kind}:{tmp_path}/*.nothing")
    (tmp_path / "empty").write_text("")
    with pytest.raises(UserError, match="empty|without a single line"):
        load(f"{kind}:{tmp_path}/empty")
    (tmp_path / "one").write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r"falls into split '\w+': use split 'all'"):
        for split in SPLITS:
            load(f"{kind}:{tmp_path}/one", split)
