"""Rows of the user's files: TSV, CSV and JSON lines, their splits, and every way to get them wrong."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import pickle
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlm.data import examples
from fastlm.errors import UserError

SPLITS = ("train", "validation", "test")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"), max_size=12)


def load(spec, split="all", **settings):
    return examples.load(spec, split, **settings)


def splits_of(spec):
    """Returns the rows of each split; a split without rows is empty."""
    found = {}
    for split in SPLITS:
        try:
            found[split] = list(load(spec, split))
        except UserError as error:
            assert "falls into split" in str(error)
            found[split] = []
    return found


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_tsv(tmp_path):
    write(tmp_path / "a.tsv", 'en\tde\n"one"\teins é\n\ntwo, 2\t\r\n')
    rows = load(f"tsv:{tmp_path}/a.tsv")
    assert rows.fields == ("en", "de") and len(rows) == 2
    assert list(rows) == [{"en": '"one"', "de": "eins é"}, {"en": "two, 2", "de": ""}]
    assert rows.get([1, 0]) == [rows[1], rows[0]]
    assert pickle.loads(pickle.dumps(rows))[1] == rows[1]


def test_csv_with_quotes_and_line_ends_in_fields(tmp_path):
    write(tmp_path / "a.csv", '\ufefflabel,"the text"\r\nx,"said ""no"",\r\nthen, yes"\r\n\r\ny,plain\n"z",""')
    rows = load(f"csv:{tmp_path}/a.csv")
    assert rows.fields == ("label", "the text")
    assert [row["the text"] for row in rows] == ['said "no",\r\nthen, yes', "plain", ""]
    assert [row["label"] for row in rows] == ["x", "y", "z"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8),
    ending=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_what_the_csv_module_writes_is_read(tmp_path, rows, ending, quoting):
    if quoting == csv.QUOTE_MINIMAL:  # it leaves a lone \r unquoted, which every reader takes for a line end
        rows = [tuple(value.replace("\r", "") for value in row) for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator=ending, quoting=quoting).writerows([("a", "b"), *rows])
    path = write(tmp_path / "any.csv", text.getvalue())
    assert [(row["a"], row["b"]) for row in load(f"csv:{path}")] == rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_what_is_written_with_tabs_is_read(tmp_path, rows):
    rows = [tuple("".join(c for c in value if c not in "\t\r\n") for value in row) for row in rows]
    path = write(tmp_path / "any.tsv", "a\tb\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    assert [(row["a"], row["b"]) for row in load(f"tsv:{path}")] == rows


def test_json_lines_are_flattened(tmp_path):
    first = {"id": 1, "score": 0.5, "ok": True, "answers": {"text": ["a", "b"], "start": [3, 4]}}
    second = {"ok": False, "score": 2, "id": 2, "answers": {"start": [0], "text": ["é"]}}
    write(tmp_path / "a.jsonl", json.dumps(first) + "\r\n \n" + json.dumps(second))
    rows = load(f"jsonl:{tmp_path}/a.jsonl")
    assert rows.fields == ("id", "score", "ok", "answers/text", "answers/start")
    assert rows[0] == {
        "id": 1,
        "score": 0.5,
        "ok": 1,
        "answers/text": "a",
        "answers/start": 3,
        examples.every("answers/text"): ("a", "b"),
    }
    assert list(rows[1].items()) == [("id", 2), ("score", 2), ("ok", 0), ("answers/text", "é"), ("answers/start", 0)]


def test_the_rest_of_a_list_moves_no_row_to_another_split(tmp_path):
    texts = [f"text {n}" for n in range(40)]
    write(tmp_path / "one.jsonl", "\n".join(json.dumps({"a": text}) for text in texts))
    write(tmp_path / "all.jsonl", "\n".join(json.dumps({"a": [text, "other"]}) for text in texts))
    one, both = ([row["a"] for row in load(f"jsonl:{tmp_path}/{name}.jsonl", "test")] for name in ("one", "all"))
    assert one == both and 0 < len(one) < len(texts)


@pytest.mark.parametrize(("suffix", "opener"), [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_compressed_files(tmp_path, suffix, opener):
    contents = {"tsv": "a\tb\n1\té\n", "csv": 'a,b\n1,"x\ny"\n', "jsonl": '{"a": "1", "b": "z"}\n'}
    for kind, text in contents.items():
        write(tmp_path / f"plain.{kind}", text)
        with opener(tmp_path / f"packed.{kind}{suffix}", "wb") as file:
            file.write(text.encode())
        plain, packed = load(f"{kind}:{tmp_path}/plain.{kind}"), load(f"{kind}:{tmp_path}/packed.{kind}{suffix}")
        assert list(plain) == list(packed) and plain.fingerprint == packed.fingerprint
    (tmp_path / f"bad.tsv{suffix}").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"bad.tsv.* does not decompress"):
        load(f"tsv:{tmp_path}/bad.tsv{suffix}")


def test_several_files_are_one_source(tmp_path):
    write(tmp_path / "a.tsv", "x\ty\n1\t2\n")
    write(tmp_path / "b.tsv", "x\ty\n3\t4\n")
    assert [row["x"] for row in load(f"tsv:{tmp_path}/*.tsv")] == ["1", "3"]
    write(tmp_path / "c.tsv", "x\tz\n3\t4\n")
    with pytest.raises(UserError, match=r"c.tsv:1: columns x, z differ from those of the file before, x, y"):
        load(f"tsv:{tmp_path}/*.tsv")


def test_files_without_a_header(tmp_path):
    write(tmp_path / "a.tsv", "train\tg1\tone\tein\ndev\tg2\ttwo\tzwei\ntest\tg3\tthree\tdrei\n")
    spec = f"tsv:{tmp_path}/a.tsv#columns=split,group,en,de"
    assert load(spec, "train")[0] == {"split": "train", "group": "g1", "en": "one", "de": "ein"}
    assert {split: [row["en"] for row in rows] for split, rows in splits_of(spec).items()} == {
        "train": ["one"],
        "validation": ["two"],
        "test": ["three"],
    }
    with pytest.raises(UserError, match=r"a.tsv:1: 'train' is a row's value and no header: name the columns"):
        load(f"tsv:{tmp_path}/a.tsv")


@pytest.mark.parametrize("alias", ["validation", "dev", "valid", "val", "DEV "])
def test_a_split_field_decides(tmp_path, alias):
    rows = [{"n": n, "split": ("train", alias, "test")[n % 3]} for n in range(9)]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = splits_of(f"jsonl:{tmp_path}/a.jsonl")
    assert {split: [row["n"] for row in found[split]] for split in SPLITS} == {
        "train": [0, 3, 6],
        "validation": [1, 4, 7],
        "test": [2, 5, 8],
    }
    assert len(load(f"jsonl:{tmp_path}/a.jsonl")) == 9


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.integers(0, 40).map("film {}".format), min_size=1, max_size=60),
    kind=st.sampled_from(["csv", "jsonl"]),
)
def test_rows_of_a_group_share_a_split_and_none_is_lost(tmp_path, groups, kind):
    rows = [{"number": str(number), "film": group} for number, group in enumerate(groups)]
    text = {
        "csv": "number,film\n" + "".join(f"{row['number']},{row['film']}\n" for row in rows),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
    }[kind]
    path = write(tmp_path / f"a.{kind}", text)
    found = splits_of(f"{kind}:{path}#group=film")
    assert sorted(int(row["number"]) for row in itertools.chain(*found.values())) == list(range(len(groups)))
    for split, members in found.items():
        expected = {"test": {0}, "validation": {1}, "train": set(range(2, 10))}[split]
        assert all(zlib.crc32(row["film"].encode()) % 10 in expected for row in members)


def test_without_a_group_the_row_decides_and_equal_rows_stay_together(tmp_path):
    lines = [f"text {number % 150}\tlabel\n" for number in range(300)]
    write(tmp_path / "a.tsv", "x\ty\n" + "".join(lines))
    found = splits_of(f"tsv:{tmp_path}/a.tsv")
    texts = {split: {row["x"] for row in rows} for split, rows in found.items()}
    assert sum(map(len, found.values())) == 300 and sum(map(len, texts.values())) == 150
    assert 15 <= len(found["test"]) <= 55 and 15 <= len(found["validation"]) <= 55
    write(tmp_path / "b.tsv", "x\ty\nmore\tlabel\n")
    for split, rows in splits_of(f"tsv:{tmp_path}/*.tsv").items():
        assert {row["x"] for row in rows} - {"more"} == texts[split]


def test_slices_and_fingerprints(tmp_path):
    write(tmp_path / "a.tsv", "x\n" + "".join(f"{number}\n" for number in range(20)))
    whole, part = load(f"tsv:{tmp_path}/a.tsv"), load(f"tsv:{tmp_path}/a.tsv", "all[25%:10]")
    assert list(part) == list(whole)[5:10] and part.get([4, 0]) == [whole[9], whole[5]]
    assert part.name == f"tsv:{tmp_path}/a.tsv/all[25%:10]" and part.fields == ("x",)
    assert len({whole.fingerprint, part.fingerprint, load(f"tsv:{tmp_path}/a.tsv", "train").fingerprint}) == 3
    assert load(f"tsv:{tmp_path}/a.tsv").fingerprint == whole.fingerprint
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "a.tsv", (tmp_path / "a.tsv").read_text())
    assert load(f"tsv:{tmp_path}/elsewhere/a.tsv").fingerprint == whole.fingerprint
    write(tmp_path / "a.tsv", (tmp_path / "a.tsv").read_text().replace("7", "8"))
    assert load(f"tsv:{tmp_path}/a.tsv").fingerprint != whole.fingerprint
    with pytest.raises(UserError, match="holds no row"):
        load(f"tsv:{tmp_path}/a.tsv", "all[5:5]")


def test_mixtures(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.tsv", f"x\n{name}\n")
    pairs = examples.load_mixture([(f"tsv:{tmp_path}/a.tsv", 3), (f"tsv:{tmp_path}/b.tsv", 1)], "all")
    assert [(rows[0]["x"], share) for rows, share in pairs] == [("a", 0.75), ("b", 0.25)]
    ((alone, share),) = examples.load_mixture(f"tsv:{tmp_path}/b.tsv", "all")
    assert share == 1 and alone[0]["x"] == "b"
    with pytest.raises(UserError, match="must be positive"):
        examples.load_mixture([(f"tsv:{tmp_path}/a.tsv", 0)], "all")


def test_fields_as_documents(tmp_path):
    write(tmp_path / "a.tsv", "n\ten\tde\n1\tone\teins\n2\ttwo\tzwei é\n")
    rows = load(f"tsv:{tmp_path}/a.tsv")
    texts = examples.FieldTexts(rows, ("en", "de"))
    assert list(texts) == [texts[index] for index in range(len(texts))] == ["one", "eins", "two", "zwei é"]
    assert texts.num_bytes == len("oneeinstwozwei é".encode())
    assert texts.fingerprint != examples.FieldTexts(rows, ("de", "en")).fingerprint
    with pytest.raises(UserError, match=r"has no field 'dee'; did you mean 'de'\? \(it has: n, en, de\)"):
        examples.FieldTexts(rows, ("dee",))
    write(tmp_path / "a.jsonl", '{"n": 1}\n')
    with pytest.raises(UserError, match="field 'n' .* holds numbers, no text"):
        examples.FieldTexts(load(f"jsonl:{tmp_path}/a.jsonl"), ("n",))


BAD_FILES = [
    ("tsv", b"a\tb\n1\t2\n\n1\t2\t3\n", r"bad:4: 3 values for the 2 columns a, b"),
    ("csv", b'a,b\n"1\n1",2\n1\n', r"bad:4: 1 values for the 2 columns a, b"),
    ("tsv", b"a\tb\n1\t2\n\xff\t2\n", r"bad:3 is not valid UTF-8 at byte 0 of the line \(0xff\).*iconv"),
    ("csv", b'a,b\n1,"2\n\xe9"\n', r"bad:3 is not valid UTF-8 at byte 0 of the line \(0xe9\)"),
    ("jsonl", b'{"a": "\xe9"}\n', r"bad:1 is not valid UTF-8 at byte 7"),
    ("tsv", b"a\tb\ta\n", r"bad:1: two columns are called 'a'"),
    ("csv", b"a,,b\n", r"bad:1: column 2 of 3 has no name"),
    ("csv", b"a;b;c\n1;2;3\n", r"bad:1: one single column 'a;b;c': separate by commas"),
    ("csv", b'a,b\n1,2\n3,"4\n5,6\n', r"bad:3 is no CSV row \(unexpected end of data\): mend its quotes"),
    ("csv", b'a,b\n1,"2" x\n', r"bad:2 is no CSV row"),
    ("tsv", b"", r"1 file\(s\) without a single row"),
    ("csv", b"a,b\n", r"1 file\(s\) without a single row"),
    ("tsv", b"split\ta\ntrain\t1\ntran\t2\n", r"bad:3: 'tran' is no split; did you mean 'train'\? \(one of: train, "),
    ("jsonl", b'{"a": 1}\n\n[1]\n', r"bad:3 is no JSON object but a list"),
    ("jsonl", b'{"a": 1}\n{"a": \n', r"bad:2 is no JSON \("),
    ("jsonl", b'{"a": 1}\n{"b": 1}\n', r"bad:2 has the fields b, but the first row has a"),
    ("jsonl", b'{"a": null}\n', r"bad:1: field 'a' is null"),
    ("jsonl", b'{"a": {"b": []}}\n', r"bad:1: field 'a/b' is an empty list"),
    ("jsonl", b'{"a": NaN}\n', r"bad:1: field 'a' is nan"),
    ("jsonl", b'{"a": {"b": 1}, "a/b": 2}\n', r"bad:1: two fields are called 'a/b'"),
    ("jsonl", b'{"a": "\\ud800"}\n', r"bad:1: field 'a' has half a surrogate pair"),
]


@pytest.mark.parametrize(("kind", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_line_when_it_is_opened(tmp_path, kind, content, message):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load(f"{kind}:{tmp_path}/bad")
    assert "\n" not in str(raised.value)


BAD_SPECS = [
    (
        "tsv:{}#group=flim",
        "all",
        r"a.tsv has no field 'flim' to group by; did you mean 'film'\? \(it has: film, text\)",
    ),
    (
        "tsv:{}#grup=film",
        "all",
        r"'grup=film' in .* is not understood; did you mean 'group'.*tsv:GLOB#group=...&columns",
    ),
    ("tsv:{}#group=", "all", "'group=' in .* is not understood"),
    ("tsv:{}#columns=a,a", "all", "two columns are called 'a'"),
    ("jsonl:{}#columns=a,b", "all", "'columns=a,b' in .* is not understood"),
    ("tsv:{}", "tset", "has no split 'tset'; did you mean 'test'"),
    ("tsv:{}", "validation", "none of the 1 rows of .* falls into split 'validation': use split 'all'"),
    ("tsv:{}.missing", "all", "no file matches tsv:"),
    ("text:{}", "all", r"no data set 'text:.*your own files are tsv:GLOB, csv:GLOB or jsonl:GLOB"),
]


@pytest.mark.parametrize(("spec", "split", "message"), BAD_SPECS)
def test_a_wrong_spec_is_an_error(tmp_path, spec, split, message):
    write(tmp_path / "a.tsv", "film\ttext\nx\ty\n")
    with pytest.raises(UserError, match=message) as raised:
        load(spec.format(tmp_path / "a.tsv"), split)
    assert "\n" not in str(raised.value)


def test_a_group_besides_a_split_field_is_refused(tmp_path):
    write(tmp_path / "a.tsv", "split\tg\ntrain\t1\n")
    with pytest.raises(UserError, match="has a field 'split', which decides: drop 'group=g'"):
        load(f"tsv:{tmp_path}/a.tsv#group=g")
