"""Source specs: one string names documents, wherever they come from.

    state_of_the_union  python_stdlib  old_testament_en  old_testament_es    work with no network
    lm1b  c4/en  wiki40b/en  tiny_shakespeare  ...                           any TFDS name, once prepared
    text:GLOB   jsonl:GLOB   jsonl:GLOB#FIELD                                the user's files

Rows of fields are data sets of the same table; `fastlm.data.examples` reads them, and here one of
their text fields can be named: python_docstrings#function.

Notable: what needs no network is a TFDS builder too, prepared on first use under the data
directory. A public name is only ever read here; `fastlm.data.prepare` fetches it.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastlm.data import tfds_documents
from fastlm.data.directory import data_directory
from fastlm.data.documents import Documents, apply_slice, parse_split
from fastlm.data.json_lines import JsonLines
from fastlm.data.text_files import TextFiles
from fastlm.errors import UserError, nearest

Sources = str | Sequence[tuple[str, float]]
"""A source spec, or several with their shares of the tokens."""


class BuiltIn(NamedTuple):
    """A data set of our own: a builder class by module and name, and its configuration."""

    module: str
    builder: str
    configuration: str | None = None


BUILT_IN = {
    "state_of_the_union": BuiltIn("state_of_the_union", "StateOfTheUnion"),
    "python_stdlib": BuiltIn("python_stdlib", "PythonStdlib"),
    "old_testament_en": BuiltIn("old_testament", "OldTestament", "en"),
    "old_testament_es": BuiltIn("old_testament", "OldTestament", "es"),
    "old_testament_en_es": BuiltIn("old_testament_pairs", "OldTestamentEnEs"),
    "python_docstrings": BuiltIn("python_docstrings", "PythonDocstrings"),
    "state_of_the_union_passages": BuiltIn("state_of_the_union_passages", "StateOfTheUnionPassages"),
    "synthetic_questions": BuiltIn("synthetic_questions", "SyntheticQuestions"),
    "list_ops": BuiltIn("list_ops", "ListOps", "short"),
    "list_ops_paper": BuiltIn("list_ops", "ListOps", "paper"),
    "pathfinder": BuiltIn("pathfinder", "Pathfinder", "small"),
    "pathfinder_paper": BuiltIn("pathfinder", "Pathfinder", "paper"),
    "digits": BuiltIn("digits", "Digits"),
    "text_bytes": BuiltIn("text_bytes", "TextBytes"),
    "retrieval_bytes": BuiltIn("retrieval_bytes", "RetrievalBytes"),
}


def load(spec: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> Documents:
    """Returns the documents of a source's split.

    Args:
      spec: A source spec as in this file's header.
      split: ``train``, ``validation`` or ``test`` (``all`` too for the user's files), with an optional
        slice: ``train[:10%]``, ``test[100:200]``.
      data_dir: Where prepared data lies; FASTLM_DATA or ~/.cache/fastlm/data if None.

    Raises:
      UserError: an unknown source or split, a data set that is not on disk, no or empty files.
    """
    name, start, stop = parse_split(split)
    documents = apply_slice(_load_split(spec, name, data_directory(data_dir)), start, stop)
    if not len(documents):
        raise UserError(f"split '{split}' of '{spec}' holds no document: widen the slice")
    return documents


def weighted_sources(sources: Sources) -> list[tuple[str, float]]:
    """Returns pairs (spec, share) with shares that sum to 1.

    Raises:
      UserError: no source, or a share that is not positive.
    """
    pairs = [(sources, 1.0)] if isinstance(sources, str) else [(str(spec), float(share)) for spec, share in sources]
    if not pairs:
        raise UserError("no data source is named: give a name or pairs (name, share)")
    for spec, share in pairs:
        if not (0 < share < float("inf")):
            raise UserError(f"the share of source '{spec}' must be positive, not {share}: drop the source instead")
    total = sum(share for _, share in pairs)
    return [(spec, share / total) for spec, share in pairs]


def prepare(name: str, data_dir: Path) -> Path:
    """Prepares the built-in data set `name` under `data_dir` unless it is there; returns its folder."""
    entry = BUILT_IN[name]
    module = importlib.import_module(f"fastlm.data.builders.{entry.module}")
    return tfds_documents.prepare_built_in(getattr(module, entry.builder), entry.configuration, data_dir)


def data_set_folder(name: str, data_dir: Path, own_files: str = "text:GLOB or jsonl:GLOB") -> Path:
    """Returns the folder of the data set `name`, prepared first if it is one of our own.

    Args:
      name: A key of `BUILT_IN`, or a TFDS name.
      data_dir: Where prepared data lies.
      own_files: What the message for an unknown name offers for the user's files.

    Raises:
      UserError: it is not on disk, or there in several configurations.
    """
    folder = prepare(name, data_dir) if name in BUILT_IN else tfds_documents.find_folder(name, data_dir)
    if folder is None:
        raise UserError(
            f"no data set '{name}' under {data_dir}{nearest(name, BUILT_IN)} (a public TFDS data set is fetched "
            f"once, by `{tfds_documents.prepare_command(name, data_dir)}`; your own files are {own_files})"
        )
    return folder


def _load_split(spec: str, split: str, data_dir: Path) -> Documents:
    kind, separator, pattern = spec.partition(":")
    if separator and kind == "text":
        return TextFiles(pattern, split)
    if separator and kind == "jsonl":
        pattern, _, field = pattern.partition("#")
        return JsonLines(pattern, split, field=field or "text", data_dir=data_dir)
    name, _, field = spec.partition("#")
    folder = data_set_folder(name, data_dir)
    return tfds_documents.TfdsDocuments(folder, name, split, field or "text")
