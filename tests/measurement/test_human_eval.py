import gzip
import itertools
import json
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.errors import UserError
from fastlm.measurement import code_execution, human_eval
from fastlm.measurement.sandbox import isolation

PROBLEMS = [
    {
        "task_id": "Small/0",
        "prompt": 'def double(x):\n    """Returns twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n",
    },
    {
        "task_id": "Small/1",
        "prompt": 'from typing import List\n\n\ndef evens(values: List[int]):\n    """Keeps even numbers."""\n',
        "entry_point": "evens",
        "canonical_solution": "    return [v for v in values if v % 2 == 0]",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2, 4]) == [2, 4]\n",
    },
    {
        "task_id": "Small/2",
        "prompt": "import math\n\n\ndef area(radius):\n    '''Area of a circle.'''\n",
        "entry_point": "area",
        "canonical_solution": "    return math.pi * radius**2\n",
        "test": "def check(candidate):\n    assert abs(candidate(1.0) - 3.14159) < 1e-4\n",
    },
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, PROBLEMS)) + "\n\n")
    return path


def test_reads_plain_and_gzipped(file, tmp_path):
    packed = tmp_path / "problems.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    problems = human_eval.read_human_eval(file)
    assert problems == human_eval.read_human_eval(packed)
    assert [problem.task_id for problem in problems] == ["Small/0", "Small/1", "Small/2"]
    assert problems[0].entry_point == "double"


def test_right_solutions_pass_and_broken_ones_fail(file):
    try:
        isolation.find()
    except UserError as error:
        pytest.skip(str(error))
    problems = human_eval.read_human_eval(file)
    broken = ("    return None\n", "    import sys; sys.exit(0)\n", "    return (\n", "    raise SystemExit\n", "pass")
    completions = [[problem.canonical_solution, *broken] for problem in problems]
    programs = [human_eval.program(p, c) for p, several in zip(problems, completions) for c in several]
    outcomes = code_execution.run_tests(programs, timeout_seconds=10.0, memory_bytes=256 << 20)
    passed = np.array([outcome.passed for outcome in outcomes]).reshape(3, 6)
    assert human_eval.pass_at_k(1, passed[:, 0], 1).mean() == 1.0
    assert human_eval.pass_at_k(5, passed[:, 1:].sum(1), 5).mean() == 0.0
    assert human_eval.pass_at_k(6, passed.sum(1), 1) == pytest.approx([1 / 6] * 3)


def damaged(**changes):
    return json.dumps({k: v for k, v in (PROBLEMS[0] | changes).items() if v is not None})


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "holds no problem"),
        ("{", "problems.jsonl:1 is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "no JSON object but a list"),
        (damaged(test=None), "no field 'test'"),
        (damaged(test=None, tests="x"), "did you mean 'tests'"),
        (damaged(prompt=3), "field 'prompt' is no text but int"),
        (damaged(entry_point="f()\nimport os"), "is no name of a function"),
        ("\n".join([damaged(), "", damaged()]), "problems.jsonl:3 gives task 'Small/0' a second time"),
    ],
)
def test_malformed_files_are_named(text, says, tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        human_eval.read_human_eval(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files_are_named(file, tmp_path):
    packed = gzip.compress(file.read_bytes())
    cases = {"cut.jsonl.gz": packed[:-20], "none.jsonl.gz": b"x", "bytes.jsonl": b"\xff\xfe\x00"}
    cases["flipped.jsonl.gz"] = packed[:40] + bytes([packed[40] ^ 255]) + packed[41:]
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in (*cases, "missing.jsonl", "."):
        with pytest.raises(UserError) as caught:
            human_eval.read_human_eval(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
    assert human_eval.pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples_is_exact():
    correct = np.array([0, 1, 7, 150, 199, 200])
    expected = [1 - comb(200 - c, 100) / comb(200, 100) for c in correct.tolist()]
    assert human_eval.pass_at_k(200, correct, 100) == pytest.approx(expected, rel=1e-12)
    assert human_eval.pass_at_k(np.array([4, 10]), np.array([1, 1]), 2) == pytest.approx([0.5, 0.2])


def test_pass_at_k_mistakes_are_named():
    for samples, correct, k in ((5, 0, 6), (5, 0, 0), (5, 6, 1), (5, -1, 1), (np.array([10, 3]), 0, 5)):
        with pytest.raises(UserError):
            human_eval.pass_at_k(samples, correct, k)
