"""The exposure gap: a student is compared with its teacher behind the data's words and behind its own."""

import jax
import jax.numpy as jnp
import pytest

from experiments import exposure_gap
from experiments.exposure_gap import DATA, OWN
from fastlm.errors import UserError
from tests.compress import students

NAMES = ["language_modeling", pytest.param("sequence_to_sequence", marks=pytest.mark.slow)]


def sums(name, seed=0, draws=0):
    """Of a student of the teacher's architecture, with the weights of `seed`; the teacher has those of 1."""
    about = students.setting(students.LARGE, name)
    task, prompt = exposure_gap.compared(about, "runs/teacher", "", 5)
    params = about.model.init(jax.random.key(seed))
    batches = [jax.tree.map(jnp.asarray, students.batch(name, number)) for number in range(2)]
    return exposure_gap.sums_of(task, params, batches, prompt, draws)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_its_teacher_is_nowhere_far_from_it(name):
    found = sums(name, seed=1)
    for behind in (DATA, OWN):
        assert found[behind]["count"] > 10
        assert abs(found[behind]["reverse_kl"]) < 1e-4 and abs(found[behind]["forward_kl"]) < 1e-4
    assert "excess: " in exposure_gap.table(found)


def test_places_behind_the_prompt_count_and_draws_are_of_the_seed():
    one, same, other = (sums("language_modeling", draws=draws) for draws in (0, 0, 1))
    assert one == same
    assert one[DATA] == other[DATA] and one[OWN]["reverse_kl"] != other[OWN]["reverse_kl"]
    mask = sum(float(students.batch(seed=number)["loss_mask"][:, 4:].sum()) for number in range(2))
    assert one[DATA]["count"] == mask
    assert 0 < one[OWN]["count"] <= 2 * (students.ROWS - 1) * (students.LENGTH + 1 - 5)  # a row scores nothing
    assert one[DATA]["reverse_kl"] > 0 and one[OWN]["reverse_kl"] > 0


def test_the_excess_is_a_ratio_of_means():
    found = {
        DATA: {"reverse_kl": 10.0, "forward_kl": 12.0, "count": 20.0},
        OWN: {"reverse_kl": 6.0, "forward_kl": 5.0, "count": 10.0},
    }
    lines = exposure_gap.table(found).splitlines()
    assert lines[2:] == [
        "| the data's words | 0.5000 | 0.6000 | 20 |",
        "| its own words | 0.6000 | 0.5000 | 10 |",
        "excess: +20.0%",
    ]


def test_tasks_that_write_nothing_are_refused():
    with pytest.raises(UserError, match="a model of this task writes no text"):
        exposure_gap.compared(students.setting(name="classification"), "runs/teacher", "", 0)
