"""Problems in HumanEval's format, the programs that test a completion, and pass@k (2107.03374).

Reads JSON lines, plain or gzipped, with the fields of the original file; other benchmarks published in that
format read the same way. The programs are run by `code_execution.run_tests`.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from fastlm.errors import UserError, nearest


@dataclass(frozen=True)
class Problem:
    """A function to write.

    Attributes:
      task_id: its name, unique in a file.
      prompt: source up to and with the docstring; a completion continues it.
      entry_point: name of the function.
      canonical_solution: a completion that is right.
      test: source that defines `check(candidate)`, which raises unless the candidate is right.
    """

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


_FIELDS = tuple(field.name for field in fields(Problem))


def read_human_eval(path: str | Path) -> list[Problem]:
    """Returns the problems of a `.jsonl` or `.jsonl.gz` file, in its order; blank lines are skipped.

    Raises:
      UserError: no such file, a damaged archive, a line that is no problem, a task given twice, or no problem.
    """
    path = Path(path)
    problems: dict[str, Problem] = {}
    for number, line in _lines(path):
        problem = _problem(line, f"{path}:{number}")
        if problem.task_id in problems:
            raise UserError(f"{path}:{number} gives task {problem.task_id[:40]!r} a second time: drop one of them")
        problems[problem.task_id] = problem
    if not problems:
        raise UserError(f"{path} holds no problem: each line must be a JSON object with {', '.join(_FIELDS)}")
    return list(problems.values())


def program(problem: Problem, completion: str) -> str:
    """Returns the source that runs to its end if the completion, put after the prompt, passes the tests."""
    return f"{problem.prompt}{completion}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def pass_at_k(samples: np.ndarray | int, correct: np.ndarray | int, k: int) -> np.ndarray:
    """Returns the unbiased estimate of the chance that one of k samples is right, 0 to 1.

    That is 1 - C(n - c, k) / C(n, k), the share of the k-subsets that hold a right sample, as a product.

    Args:
      samples: n, how many were drawn for each problem [P], or one number for all.
      correct: c, how many of them passed [P].
      k: how many may be tried.

    Raises:
      UserError: k is not in 1..n, or c is not in 0..n, for some problem.
    """
    samples, correct = np.broadcast_arrays(np.asarray(samples), np.asarray(correct))
    if k < 1 or np.any(samples < k):
        raise UserError(f"pass@{k} needs at least k={k} samples of each problem (and k >= 1), not {samples.min()}")
    if np.any((correct < 0) | (correct > samples)):
        raise UserError("the number of correct samples must lie between 0 and the number of samples")
    missed = np.ones(samples.shape)
    for tried in range(k):
        missed *= np.maximum(samples - correct - tried, 0) / (samples - tried)
    return 1.0 - missed


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text: problems are JSON lines, or those gzipped as .gz") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a HumanEval file") from None


def _problem(line: str, where: str) -> Problem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}): mend or drop the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} is no JSON object but a {type(record).__name__}: each line must be {{...}}")
    for name in _FIELDS:
        if name not in record:
            raise UserError(f"{where} has no field '{name}'{nearest(name, record)}: it is no HumanEval problem")
        if not isinstance(record[name], str):
            raise UserError(f"{where}: field '{name}' is no text but {type(record[name]).__name__}")
    if not record["entry_point"].isidentifier():
        raise UserError(f"{where}: entry_point {record['entry_point'][:40]!r} is no name of a function")
    return Problem(**{name: record[name] for name in _FIELDS})
