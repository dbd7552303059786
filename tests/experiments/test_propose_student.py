"""The table of students, and the words beside it."""

from experiments import propose_student
from fastlm.models import ModelConfig
from fastlm.search import students

CFG = ModelConfig(vocab_size=50, max_length=64, layers=4, width=64, heads=4)


def test_the_teacher_comes_first_and_shares_are_of_it():
    proposed = students.propose(CFG, parameters=0.5, count=2)
    lines = propose_student.table(CFG, proposed).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 5
    assert lines[2].startswith("| teacher | 4 | 64 | 4 (4) | 256 | 200,384 | 1 | 197,184 |")
    assert f"| {proposed[0].parameters:,} | {proposed[0].share:.3f} | {proposed[0].inner_share:.3f} |" in lines[3]
    assert "speed" not in lines[0]
