"""Students under a budget: counted exactly, within it, of shapes that can be sliced; and the words that train them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import configuration
from fastlm.compress.parts import Part
from fastlm.errors import UserError
from fastlm.models import Compute, ModelConfig
from fastlm.search import students
from fastlm.search.clock import clock
from fastlm.search.shapes import Sizes, layers_of, parameters_of, shapes
from fastlm.training import initial

CFG = ModelConfig(vocab_size=50, max_length=64, layers=3, width=64, heads=4, kv_heads=2, feed_forward="swiglu")
TEACHERS = {
    "decoder": dataclasses.replace(CFG, attention=("full", "gated_delta"), qkv_bias=True),
    "classifier": dataclasses.replace(
        CFG, family="encoder", head="sequence", classes=3, pooler="tanh", bias=True, positions="learned"
    ),
    "translator": dataclasses.replace(CFG, family="encoder_decoder", encoder_layers=2, positions="relative"),
}
SIZES = {name: Sizes(cfg) for name, cfg in TEACHERS.items()}


@settings(max_examples=8)
@given(st.sampled_from(list(TEACHERS)), st.integers(0, 10**6))
def test_shapes_are_counted_as_they_are_made(name, number):
    cfg, every = TEACHERS[name], shapes(TEACHERS[name])
    shape = every[number % len(every)]
    part = Part(layers_of(cfg, shape.layers, shape.encoder_layers), shape.width, shape.feed_forward_width, shape.heads)
    ((found, _),) = SIZES[name].of([shape])
    assert found == parameters_of(part.config(cfg))[0]


@pytest.mark.parametrize("name", TEACHERS)
def test_proposals_keep_to_the_budget_and_use_it(name):
    cfg = TEACHERS[name]
    found = students.propose(cfg, parameters=0.5, length=32)
    total, inner = parameters_of(cfg)
    assert found and len({one.cfg.layers for one in found}) == len(found), "one of each depth"
    for one in found:
        assert parameters_of(one.cfg) == (one.parameters, pytest.approx(one.inner_share * inner))
        assert one.parameters == pytest.approx(one.share * total) and one.share <= 0.5
        assert one.part.config(cfg) == one.cfg
        assert one.cfg.layer(0).head_dim == cfg.layer(0).head_dim
    assert found[0].share > 0.4 and found[0].work < 0.7
    best = found[0].cfg
    assert abs(np.log(best.width / cfg.width / (best.layers / cfg.layers))) < 0.7, "neither flat nor thin"
    assert students.propose(cfg, parameters=total // 2, length=32) == found, "a number is a share of it"


def test_without_parts_of_width_there_is_depth():
    found = students.propose(dataclasses.replace(CFG, positions="sinusoidal"), parameters=0.6)
    assert found and all(one.cfg.width == 64 for one in found)
    found = students.propose(dataclasses.replace(CFG, positions="alibi"), parameters=0.6)
    assert found and all(one.cfg.heads == 4 for one in found)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "no budget: give --parameters, --speed, or both"),
        ({"parameters": 0.0}, "--parameters: must be a share up to 1, or a number above 1, got 0.0"),
        ({"parameters": 1.5}, r"no student has at most 2 parameters: the smallest that can be sliced has [\d,]+ param"),
        ({"speed": 0.5}, "--speed: must be at least 1 time the teacher's"),
        ({"speed": 1e6}, "no student has at most 1e-06 of the FLOPs: the smallest"),
    ],
)
def test_budgets_that_cannot_be_met(budget, message):
    with pytest.raises(UserError, match=message):
        students.propose(CFG, clock=lambda teacher, small: [1.0] * len(small), **budget)


def test_time_is_what_the_clock_says():
    """Here every layer takes as long as any other, however wide it is."""
    asked = []

    def by_depth(teacher, small):
        asked.append([one.layers for one in small])
        return [teacher.layers / one.layers for one in small]

    found = students.propose(CFG, speed=1.5, clock=by_depth, count=2)
    assert found and all(one.speed >= 1.5 and one.cfg.layers <= 2 for one in found)
    assert len(asked) >= 1 and max(map(len, asked)) <= 2
    both = students.propose(CFG, speed=1.5, parameters=0.3, clock=by_depth)
    assert all(one.speed >= 1.5 and one.share <= 0.3 for one in both)
    with pytest.raises(UserError, match=r"nothing was as fast as that; the nearest has .* and is 1\.10 times as fast"):
        students.propose(CFG, speed=2.0, clock=lambda teacher, small: [1.1] * len(small), count=2)


def test_its_words_make_the_same_model(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for cfg in TEACHERS.values():
        for one in students.propose(cfg, parameters=0.4, count=1):
            sections = {"init": {}, "model": {}}
            for word in students.overrides(cfg, one, str(tmp_path)):
                path, _, value = word.removeprefix("--config.").partition("=")
                name, key = path.split(".")
                sections[name][key] = int(value) if value.isdecimal() else value
            init = configuration.make(initial.Init, "init", sections["init"])
            assert initial.Start(init, 1, cfg, None, {}).architecture(sections["model"]) == one.cfg


@pytest.mark.parametrize("name", ["decoder", pytest.param("classifier", marks=pytest.mark.slow)])
def test_the_clock_runs_what_a_student_would(name):
    cfg = dataclasses.replace(TEACHERS[name], attention="full", layers=1)
    small = Part(width=16).config(cfg)
    (speed,) = clock(Compute(), length=8, tokens=8, turns=2)(cfg, [small])
    assert 0.05 < speed < 500
