"""What a trained model says of texts and rows that nobody has labelled.

    python -m fastlm.predict --workdir runs/classify_small --text "We must build more railroads."
    python -m fastlm.predict --workdir runs/question_answering_small \\
        --row '{"question": "Who spoke?", "context": "Then Lincoln spoke."}'
    python -m fastlm.predict --workdir runs/classify_small --rows "tsv:mine.tsv" > labelled.jsonl

Prints one JSON object per row: what was read, and what the model said: a label with its probability, a number, a span
of the context, a written text; of a masked language model, the words that fit at each [MASK]; of a model without a
head, an embedding.
"""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from absl import flags

from fastlm import command_line, configuration
from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers.base import check_text
from fastlm.errors import UserError
from fastlm.parallel import mesh as meshes
from fastlm.parallel import multihost
from fastlm.tasks.kind import TaskKind
from fastlm.tasks.rows import RowsKind
from fastlm.training import restore

WORKDIR = flags.DEFINE_string("workdir", None, "a run of fastlm.train, or what fastlm.convert wrote")
STEP = flags.DEFINE_string("step", "", "checkpoint: a number, 'best', or nothing for the newest")
TEXT = flags.DEFINE_multi_string("text", [], "a text, for tasks that read one; may be repeated")
ROW = flags.DEFINE_multi_string("row", [], "a JSON object with the fields that the task reads; may be repeated")
ROWS = flags.DEFINE_string("rows", "", "many rows: jsonl:GLOB, tsv:GLOB, csv:GLOB, or the name of a data set")
SPLIT = flags.DEFINE_string("split", "", "with --rows: which split; all of a file, else test")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "rows at a time, rounded up to a multiple of the devices")
AVERAGE = flags.DEFINE_bool("average", None, "use averaged weights; default: if the run kept any")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "compute type; default that of training")

FILES = ("jsonl", "tsv", "csv", "text")


def main() -> None:
    """Restores, reads, prints."""
    logging.getLogger("fastlm").setLevel(logging.WARNING)  # how a handful of rows is prepared is nobody's business
    mesh = meshes.make()
    jax.set_mesh(mesh)
    restored = restore.restore(WORKDIR.value, mesh, step=STEP.value, average=AVERAGE.value, dtype=DTYPE.value)
    kind = restored.kind()
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    evaluation = Evaluation(batch_size=-(-max(1, BATCH_SIZE.value) // devices) * devices)
    trained = restored.trained(kind, mesh)
    data = configuration.make(Data, "data", restored.about["config"]["data"])
    with asked(kind) as (source, split, folder):
        data = dataclasses.replace(data, sources=((source, 1.0),), data_dir=folder or data.data_dir)
        answers = kind.answers(trained, data, evaluation, split)
    if multihost.is_primary():
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False))


@contextmanager
def asked(kind: TaskKind) -> Iterator[tuple[str, str, str]]:
    """Yields a source with what is asked about, its split, and a folder for its caches ("" for the usual one).

    Raises:
      UserError: nothing is asked, or it does not have the fields that the task reads.
    """
    if bool(ROWS.value) == bool(TEXT.value or ROW.value):
        raise UserError("nothing to read, or too much; give --text TEXT, --row JSON or --rows SOURCE")
    if ROWS.value:
        default = "all" if ROWS.value.partition(":")[0] in FILES else "test"
        yield ROWS.value, SPLIT.value or default, ""
        return
    fields = kind.unlabelled().text_fields if isinstance(kind, RowsKind) else ("text",)
    if TEXT.value and len(fields) > 1:
        raise UserError(f"--text: this task reads {' and '.join(fields)}; give them as --row with a JSON object")
    for text in TEXT.value + ROW.value:
        check_text(text, "the text")
    rows = [{fields[0]: text} for text in TEXT.value] + [parse_row(text, fields) for text in ROW.value]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield f"jsonl:{file}", "all", folder


def parse_row(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """Returns the fields of a row that is given as JSON.

    Raises:
      UserError: it is no JSON object, or lacks a field.
    """
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"--row: {text[:60]!r} is no JSON ({error})") from None
    if not isinstance(row, dict) or not set(fields) <= row.keys():
        raise UserError(f"--row: {text[:60]!r} must be a JSON object with {', '.join(fields)}")
    for name in fields:
        if not isinstance(row[name], (str, int, float)) or isinstance(row[name], bool):
            raise UserError(f"--row: '{name}' must be a text or a number, got {json.dumps(row[name])[:40]}")
    return {name: str(row[name]) for name in fields}


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    command_line.main(main)
