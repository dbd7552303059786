"""Writes the texts that a teacher gives for a training set, to be learned from (Kim and Rush, arXiv 1606.07947).

    launch/local.sh -m experiments.teacher_texts --workdir runs/translate_small --folder runs/teacher_texts
    launch/local.sh -m fastlm.train --config configs/translate_small.py --workdir runs/student \\
        --config.data.sources="(('jsonl:runs/teacher_texts/*.jsonl', 1.0),)"

Sequence-level distillation: of each training row the target is replaced by what the teacher writes for its source, the
best of --beams; rows of the other splits are kept as they are. Files are those of `experiments.row_files`: a stopped
run goes on with the next one. Works for every task of sequences: translation, summaries, code.
Left out: other losses on these texts (`compress.distill` may be added to the student's config), several hypotheses
for a source.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import row_files
from fastlm import command_line
from fastlm.data.documents import SPLITS
from fastlm.data.examples import Row
from fastlm.data.settings import Data
from fastlm.errors import UserError
from fastlm.parallel import mesh as meshes
from fastlm.tasks.kind import Trained
from fastlm.tasks.sequence_to_sequence import SequenceToSequence
from fastlm.training import quality, restore

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; not on import, for experiments that stand side by side share names."""
    flags.DEFINE_string("workdir", None, "the teacher's")
    flags.DEFINE_string("folder", None, "where the files go")
    flags.DEFINE_integer("beams", 0, "of the search; 0 for those of the teacher's task", lower_bound=0)
    flags.DEFINE_integer("batch_size", 32, "sources at a time", lower_bound=1)
    flags.DEFINE_integer("rows_per_file", 512, "rows that one file holds", lower_bound=1)
    flags.DEFINE_integer("most", 0, "training rows to write; 0 for all", lower_bound=0)
    flags.mark_flags_as_required(["workdir", "folder"])


def rows_of(kind: SequenceToSequence, data: Data, split: str, most: int = 0) -> list[Row]:
    """Returns source and target of the rows of a split, of all sources."""
    rows = [row for loaded, _ in kind.load(data, split) for row in loaded]
    return [{name: row[name] for name in kind.text_fields} for row in rows[: most or None]]


def write(kind: SequenceToSequence, trained: Trained, data: Data, folder: Path, settings: dict[str, Any]) -> int:
    """Writes what is missing; returns how many files it wrote.

    Args:
      settings: "batch_size", "rows_per_file" and "most", with whatever else must be the same when a folder is gone on
        with.

    Raises:
      UserError: the folder holds texts of other settings, or cannot be written.
    """

    def answered(start: int, rows: list[Row]) -> list[Row]:
        del start
        texts = kind.write(trained, rows, data, settings["batch_size"])
        return [row | {kind.target: text} for row, text in zip(rows, texts, strict=True)]

    rows = rows_of(kind, data, data.split, settings["most"])
    others = {split: functools.partial(rows_of, kind, data, split) for split in SPLITS if split != "train"}
    return row_files.write(folder, settings, rows, answered, others)


def main() -> None:
    """Restores the teacher and writes."""
    mesh = meshes.share_weights(1)
    jax.set_mesh(mesh)
    restored = restore.restore(FLAGS.workdir, mesh)
    kind = restored.kind()
    if not isinstance(kind, SequenceToSequence):
        raise UserError(f"--workdir: {FLAGS.workdir} writes no targets for sources; its task is {type(kind).__name__}")
    kind = dataclasses.replace(kind, beams=FLAGS.beams or kind.beams)
    data, _, _ = quality.data_of(restored, quality.Asked())
    names = ("batch_size", "rows_per_file", "most")
    settings = {name: getattr(FLAGS, name) for name in names}
    settings |= {"workdir": FLAGS.workdir, "step": restored.step, "beams": kind.beams}
    write(kind, restored.trained(kind, mesh), data, Path(FLAGS.folder), settings)
    print(f"train on them with --config.data.sources=\"(('jsonl:{FLAGS.folder}/*.jsonl', 1.0),)\"")


if __name__ == "__main__":
    define_flags()
    command_line.main(main)
