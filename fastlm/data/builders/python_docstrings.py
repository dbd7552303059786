"""Functions of the standard library with their docstrings: code to summarise, and docstrings to write code for.

One row per top-level function or method with a docstring: `docstring` is its first paragraph, on one
line; `function` its source without the docstring; `prompt` its header with that docstring (as a
HumanEval prompt, arXiv 2107.03374) and `body` what follows, so that prompt + body is a whole function.
Split by file as python_stdlib.py does. Equal functions of several files are kept once, in the most held-out
split, so no test function was trained on. Left out: decorators, nested functions, functions above 1,500 characters,
docstrings of under three words, and the rare ones that share a line with code.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from fastlm.data.builders import dataset_info, python_stdlib

_LONGEST = 1500
_LONGEST_DOCSTRING = 500
_FEWEST_WORDS = 3
_SPLITS = ("test", "validation", "train")  # the most held-out first
_WIDTH = 79


class DocumentedFunction(NamedTuple):
    """A function's name and the texts made of it, dedented."""

    name: str
    function: str
    docstring: str
    prompt: str
    body: str


def documented_functions(source: str) -> Iterator[DocumentedFunction]:
    """Yields the documented functions and methods of a module's source, in order.

    Raises:
      SyntaxError: the source is no Python of this interpreter.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in old strings
        module = ast.parse(source)
    lines = source.splitlines(keepends=True)
    for name, node in _functions(module):
        found = _documented(name, node, lines)
        if found is not None:
            yield found


def _functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{inner.name}", inner


def _documented(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> DocumentedFunction | None:
    docstring = _first_paragraph(ast.get_docstring(node) or "")
    if len(docstring.split()) < _FEWEST_WORDS or len(docstring) > _LONGEST_DOCSTRING or docstring.startswith(">>>"):
        return None
    first = node.body[0]
    header = _dedented(lines[node.lineno - 1 : first.lineno - 1], node.col_offset)
    body = _dedented(lines[first.end_lineno : node.end_lineno], node.col_offset)
    if len(header) + len(body) > _LONGEST or not _is_same(header + body, node):
        return None
    indent = " " * (first.col_offset - node.col_offset)
    prompt = header + textwrap.indent(_literal(docstring, _WIDTH - len(indent)), indent) + "\n"
    return DocumentedFunction(name, header + body, docstring, prompt, body)


def _first_paragraph(docstring: str) -> str:
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def _dedented(lines: list[str], columns: int) -> str:
    """Joins lines without their first `columns` spaces; lines that stand further left (comments) start at 0."""
    return "".join((line[columns:] or "\n") if not line[:columns].strip() else line.lstrip(" ") for line in lines)


def _is_same(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether `source` is the function of `node` without its docstring.

    It is not where the docstring was all there is or shares a line with code, or a string of several lines
    was dedented too.
    """
    try:
        (found,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        return False
    kept = [node.args, *node.body[1:]]
    return type(found) is type(node) and list(map(ast.dump, [found.args, *found.body])) == list(map(ast.dump, kept))


def _literal(text: str, width: int) -> str:
    """Returns a triple-quoted literal of `text`, wrapped."""
    text = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    text = text[:-1] + '\\"' if text.endswith('"') else text
    wrapped = textwrap.wrap(text, width - 3, break_long_words=False, break_on_hyphens=False)
    closing = '"""' if len(wrapped) == 1 and len(wrapped[0]) <= width - 6 else '\n"""'
    return '"""' + "\n".join(wrapped) + closing


def rows_by_split() -> dict[str, list[dict[str, str]]]:
    """Returns the rows of each split of the running interpreter's library, the most held-out first."""
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in _SPLITS}
    seen: set[str] = set()
    for split in _SPLITS:
        for path, source in python_stdlib.files(split):
            try:
                found = list(documented_functions(source))
            except SyntaxError:
                continue  # templates and deliberately broken files of some distributions
            rows[split] += [{"path": path, **row._asdict()} for row in found if row.function not in seen]
            seen |= {row.function for row in found}
    return rows


class PythonDocstrings(tfds.core.GeneratorBasedBuilder):
    """One row per documented function."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = python_stdlib.PythonStdlib.BUILDER_CONFIGS

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("path", *DocumentedFunction._fields)
        return dataset_info(
            self,
            "Functions of the Python standard library with the first paragraph of their docstrings.",
            **{name: tfds.features.Text() for name in names},
        )

    def _split_generators(self, download_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(rows) for split, rows in rows_by_split().items()}

    def _generate_examples(self, rows: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, str]]]:
        for number, row in enumerate(rows):
            yield f"{number:06d}", row
