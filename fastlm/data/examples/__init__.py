"""Rows of fields as data: pairs, labelled examples, questions; one spec string names them.

    old_testament_en_es  python_docstrings  synthetic_questions    work with no network
    digits  list_ops  pathfinder  text_bytes  retrieval_bytes      the long-range suite: so do these
    squad  glue/sst2  imdb_reviews  cifar10  ...                   any TFDS name, once prepared
    tsv:GLOB   csv:GLOB   jsonl:GLOB                               the user's files; .gz, .bz2, .xz are read through
    tsv:GLOB#columns=split,group,en,de                             files without a header row
    csv:GLOB#group=movie_name                                      rows of one movie stay in one split

Notable: the counterpart of `fastlm.data.sources`, with its splits and slices, its data sets, its data directory. What
turns rows into batches is `fastlm.data.bucketing`.
"""

import os

from fastlm.data.directory import data_directory
from fastlm.data.documents import parse_split, slice_range
from fastlm.data.examples.base import Examples, Row, Selection, every
from fastlm.data.examples.options import parse_file_spec
from fastlm.data.examples.texts import FieldTexts
from fastlm.data.examples.tfds_rows import TfdsExamples
from fastlm.data.examples.user_files import FileExamples
from fastlm.data.sources import Sources, data_set_folder, weighted_sources
from fastlm.errors import UserError

__all__ = ["Examples", "FieldTexts", "Row", "every", "load", "load_mixture"]


def load(spec: str, split: str, *, data_dir: str | os.PathLike[str] | None = None) -> Examples:
    """Returns the rows of a source's split.

    Args:
      spec: A source spec as in this file's header.
      split: ``train``, ``validation`` or ``test`` (``all`` too for the user's files; a public data set has its own),
        with an optional slice: ``train[:10%]``, ``test[100:200]``.
      data_dir: Where prepared data lies; FASTLM_DATA or ~/.cache/fastlm/data if None.

    Raises:
      UserError: an unknown source or split, a data set that is not on disk, no files, a bad row in them.
    """
    name, start, stop = parse_split(split)
    examples = _load_split(spec, name, data_dir)
    if start or stop:
        chosen = slice_range(len(examples), start, stop)
        if not chosen:
            raise UserError(f"split '{split}' of '{spec}' holds no row: widen the slice")
        return Selection(examples, chosen, f"{examples.name}[{start}:{stop}]")
    return examples


def load_mixture(
    sources: Sources, split: str, *, data_dir: str | os.PathLike[str] | None = None
) -> list[tuple[Examples, float]]:
    """Returns a split of each source with its share; shares sum to 1.

    Args:
      sources: A source spec, or pairs (spec, share of the rows).
      split: Split of every source, with an optional slice.
      data_dir: Where prepared data lies.

    Raises:
      UserError: as `load`; no source, or a share that is not positive.
    """
    return [(load(spec, split, data_dir=data_dir), share) for spec, share in weighted_sources(sources)]


def _load_split(spec: str, split: str, data_dir: str | os.PathLike[str] | None) -> Examples:
    folder = data_directory(data_dir)
    files = parse_file_spec(spec)
    if files:
        return FileExamples(files, split, folder)
    found = data_set_folder(spec, folder, own_files="tsv:GLOB, csv:GLOB or jsonl:GLOB")
    return TfdsExamples(found, spec, split)
