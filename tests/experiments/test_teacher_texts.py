"""A teacher's texts as a training set: whole files, resumable, splits that are not trained on as they were."""

import dataclasses
import json

import pytest

from experiments import teacher_texts
from fastlm.data.settings import Data
from fastlm.errors import UserError
from fastlm.tasks.sequence_to_sequence import SequenceToSequence

SETTINGS = {"batch_size": 2, "rows_per_file": 3, "most": 0, "step": 1}


@dataclasses.dataclass(frozen=True)
class Writes(SequenceToSequence):
    """A teacher that writes each source backwards."""

    def write(self, trained, rows, data, batch_size):
        assert batch_size == 2
        trained.append(len(rows))
        return [row["source"][::-1] for row in rows]


@pytest.fixture
def data(tmp_path):
    lines = ["source\ttarget\tsplit"]
    lines += [f"s{i}\tt{i}\t{split}" for i, split in enumerate(["train"] * 7 + ["validation"] * 2 + ["test"])]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    return Data(sources=((f"tsv:{tmp_path}/rows.tsv", 1.0),), data_dir=str(tmp_path / "data"))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_rows_are_the_teachers_and_the_others_the_truth(data, tmp_path):
    kind, asked, folder = Writes(), [], tmp_path / "texts"
    assert teacher_texts.write(kind, asked, data, folder, SETTINGS) == 5
    assert asked == [3, 3, 1]
    student = dataclasses.replace(data, sources=((f"jsonl:{folder}/*.jsonl", 1.0),))
    plain = SequenceToSequence()
    assert [row["target"] for rows, _ in plain.load(student, "train") for row in rows] == [f"{i}s" for i in range(7)]
    assert [row["target"] for rows, _ in plain.load(student, "validation") for row in rows] == ["t7", "t8"]
    assert [row["target"] for rows, _ in plain.load(student, "test") for row in rows] == ["t9"]


def test_a_stopped_run_goes_on_with_the_next_file(data, tmp_path):
    kind, asked, folder = Writes(), [], tmp_path / "texts"
    teacher_texts.write(kind, asked, data, folder, SETTINGS)
    (folder / "train-00001.jsonl").unlink()
    assert teacher_texts.write(kind, asked, data, folder, SETTINGS) == 1
    assert asked == [3, 3, 1, 3]
    assert [row["source"] for row in read(folder / "train-00001.jsonl")] == ["s3", "s4", "s5"]
    with pytest.raises(UserError, match="these rows have other settings .* name another --folder"):
        teacher_texts.write(kind, asked, data, folder, SETTINGS | {"step": 2})


def test_only_so_many_rows(data, tmp_path):
    asked = []
    teacher_texts.write(Writes(), asked, data, tmp_path / "texts", SETTINGS | {"most": 4})
    assert asked == [3, 1]
