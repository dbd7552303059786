"""What is timed beside what, and what the table makes of it."""

import pytest

from experiments.benchmarks import distillation_steps
from experiments.benchmarks.distillation_steps import CACHED, LIVE, PLAIN
from fastlm import command_line
from fastlm.errors import UserError


def test_variants_differ_by_where_the_teacher_is():
    config = command_line.load_config("configs/distill/language_model.py", [])
    found = distillation_steps.variants(config, "runs/targets")
    assert found[PLAIN]["wrappers"] == () and found[LIVE] == config
    assert found[CACHED]["wrappers"] == ("distilled",)
    section = found[CACHED]["distilled"]
    assert section["teachers"] == () and section["cache"] == "runs/targets"
    assert section["terms"] == (("cross_entropy", 0.3), ("cached_kl", 0.7))
    assert all(found[name]["model"] == config["model"] for name in found)


def test_terms_that_no_cache_stands_in_for_are_refused():
    terms = "(('cross_entropy', 0.3), ('forward_kl', 0.7), ('hidden', 0.1))"
    config = command_line.load_config("configs/distill/language_model.py", [f"distilled.terms={terms}"])
    with pytest.raises(UserError, match="a cache stands in for one 'forward_kl'"):
        distillation_steps.variants(config, "runs/targets")


def test_ratios_are_of_turns():
    """One turn in which the machine was twice as slow changes no ratio."""
    seconds = {PLAIN: [0.1, 0.2, 0.1], LIVE: [0.15, 0.3, 0.15], CACHED: [0.105, 0.21, 0.105]}
    lines = distillation_steps.table({name: [{"seconds": one} for one in each] for name, each in seconds.items()})
    assert lines.splitlines()[2:] == [
        "| no teacher | 100 | 1.000 |",
        "| live teacher | 150 | 1.500 |",
        "| cached targets | 105 | 1.050 |",
    ]
