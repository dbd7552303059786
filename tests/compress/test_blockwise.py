"""Blocks that learn each by itself: what they are compared with, what moves, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastlm.compress.distill import Distilled
from fastlm.compress.lora import Lora
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.ops.masks import MaskSpec
from fastlm.ops.paths import flatten, inside
from fastlm.training import initial
from fastlm.training.optimizers import make as make_optimizer
from tests.compress.students import KINDS, LENGTH, ROWS, SMALL, batch, of, setting, trained, wrapped

BLOCKS = (("blocks", 1.0),)
LOCAL = dataclasses.replace(SMALL, attention="local(window=4)")
EXACT = dataclasses.replace(SMALL, attention=f"local(window={LENGTH})")
SLOWLY = pytest.mark.slow


def of_teacher(task, cfg, seed=3):
    """The teacher's weights in a student of `cfg`, with what is new made anew."""
    weights = task.constants["blocks"]["weights"]["model"]
    converted = [f"layers/{i}/{kind}" for i in range(cfg.total_layers) for kind in ("attention", "cross_attention")]
    return initial.taken_over(weights, cfg, jax.random.key(seed), where="here", converted=tuple(converted))


def losses(task, params, given):
    """The distance of each layer and their mean."""
    loss = jax.jit(lambda p, c, x: task.loss({"model": p}, c, task.carry(ROWS), x, jnp.int32(0), None))
    total, count, (_, aux) = loss(params, task.constants, given)
    metrics = task.summarize({name: np.asarray(value, np.float64) for name, value in aux["sums"].items()})
    np.testing.assert_allclose(total / count, metrics["loss"], rtol=1e-5)
    return metrics


@pytest.mark.parametrize("student", ["local(window=4)", ("full", "gated_linear")])
def test_each_block_is_given_what_the_teachers_is_given(student):
    """The distances are those of `Model.block`, called alone on the teacher's hidden states."""
    cfg = dataclasses.replace(SMALL, attention=student)
    about = setting(cfg, cfg=SMALL)
    task = wrapped(about, terms=BLOCKS)
    params, given = of_teacher(task, cfg), jax.tree.map(jnp.asarray, batch())
    teacher, weights = Model(SMALL), task.constants["blocks"]["weights"]["model"]
    context = {name: given[name] for name in ("positions", "segment_ids")}
    _, aux = teacher.features(weights, given["tokens"], capture=("hidden",), **context)
    mask = MaskSpec(True, given["segment_ids"], given["segment_ids"])
    expected, real = {}, np.asarray(given["segment_ids"] > 0)
    for i in (0, 1) if isinstance(student, str) else (1,):
        x, y = (np.asarray(aux["hidden"][place], np.float64) for place in (i, i + 1))
        own, _, _ = about.model.block(params, i, aux["hidden"][i], positions=given["positions"], mask=mask)
        over_row = lambda z, real=real: np.sum(np.sum(z**2, axis=-1) * real, axis=1)
        expected[f"layer_{i}"] = np.mean(over_row(np.asarray(own, np.float64) - y) / over_row(y - x))
    found = losses(task, params, given)
    assert found.keys() == {"loss", *expected}
    for name, value in expected.items():
        assert value > 1e-3
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "name", [name if name == "language_modeling" else pytest.param(name, marks=SLOWLY) for name in KINDS]
)
def test_attention_that_comes_to_the_same_is_at_no_distance(name):
    """A window as long as the rows is full attention: in every task, with padding, documents and a source."""
    task = wrapped(setting(EXACT, name, cfg=SMALL), terms=BLOCKS)
    cfg = of(name, EXACT)[1]
    params = of_teacher(task, cfg)
    given = task.prepare({}, task.constants, jax.tree.map(jnp.asarray, batch(name)), 0, None)
    found = losses(task, params, given)
    assert found.keys() == {"loss", *(f"layer_{i}" for i in range(cfg.total_layers))}
    assert found["loss"] < 1e-6
    moved = jax.tree.map(lambda x: x * 1.5, params["layers"]["1"])
    assert losses(task, {**params, "layers": {**params["layers"], "1": moved}}, given)["layer_1"] > 1e-2


@pytest.mark.parametrize("train", ["attention", pytest.param("block", marks=SLOWLY)])
def test_only_what_is_converted_learns(train):
    """Everything else keeps its bits, has no gradient and no state in the optimizer."""
    cfg = dataclasses.replace(SMALL, attention=("full", "local(window=4)"))
    about = setting(cfg, cfg=SMALL)
    task = wrapped(about, terms=((f"blocks(train='{train}')", 1.0),))
    shapes = jax.eval_shape(lambda: {"model": about.model.init(jax.random.key(0))})
    optimizer = make_optimizer(
        name="adamw",
        learning_rate=1e-2,
        params=shapes,
        weight_decay=0.1,
        groups=tuple((path, {"frozen": True}) for path in task.frozen),
    )
    start, _ = trained(task, about.model, steps=0, optimizer=optimizer)
    end, _ = trained(task, about.model, steps=20, optimizer=optimizer)
    part = "model/layers/1" if train == "block" else "model/layers/1/attention"
    before, after = flatten(start.params), flatten(end.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if inside(path, [part])}
    assert len([leaf for leaf in jax.tree.leaves(end.optimizer) if leaf.shape]) == 2 * len(moved)
    first, last = (losses(task, one.params["model"], jax.tree.map(jnp.asarray, batch())) for one in (start, end))
    assert last["loss"] < 0.9 * first["loss"]


def test_a_layer_learns_the_same_whatever_the_others_do():
    about = setting(LOCAL, cfg=SMALL)
    task = wrapped(about, terms=BLOCKS)
    given = jax.tree.map(jnp.asarray, batch())
    gradient = jax.jit(
        jax.grad(lambda p, c: task.loss({"model": p}, c, task.carry(ROWS), given, jnp.int32(0), None)[0])
    )
    params = jax.jit(about.model.init)(jax.random.key(5))
    one = gradient(params, task.constants)["layers"]["1"]
    params["layers"]["0"] = jax.tree.map(lambda x: x + 0.1, params["layers"]["0"])
    params["embedding"] = jax.tree.map(lambda x: x - 0.1, params["embedding"])
    for path, leaf in flatten(gradient(params, task.constants)["layers"]["1"]).items():
        np.testing.assert_array_equal(leaf, flatten(one)[path], err_msg=path)
        assert (float(jnp.abs(leaf).max()) > 0) == path.startswith("attention/")


def test_no_gradient_reaches_the_teacher():
    about = setting(LOCAL, cfg=SMALL)
    task = wrapped(about, terms=BLOCKS)
    params = {"model": jax.jit(about.model.init)(jax.random.key(5))}
    given = jax.tree.map(jnp.asarray, batch())
    loss = lambda c: task.loss(params, c, task.carry(ROWS), given, jnp.int32(0), None)[0]
    gradients = jax.jit(jax.grad(loss))(task.constants)
    assert all(float(jnp.max(jnp.abs(leaf))) == 0 for leaf in jax.tree.leaves(gradients))


@SLOWLY
def test_microbatches_sum_to_the_large_batch_and_weights_scale():
    about, sgd = setting(LOCAL, cfg=SMALL), optax.sgd(0.1)
    task = wrapped(about, terms=BLOCKS)
    whole, _ = trained(task, about.model, steps=2, optimizer=sgd)
    parts, _ = trained(task, about.model, steps=2, accumulation=2, optimizer=sgd)
    double, _ = trained(wrapped(about, terms=(("blocks", 2.0),)), about.model, steps=2, optimizer=optax.sgd(0.05))
    for path, leaf in flatten(whole.params).items():
        for other in (parts, double):
            np.testing.assert_allclose(leaf, flatten(other.params)[path], atol=1e-5, rtol=0, err_msg=path)


def test_what_is_predicted_is_the_whole_students():
    """The score at the end of the first stage is of the student from end to end."""
    about = setting(LOCAL, cfg=SMALL)
    plain, task = about.kind.make(about.model, about.tokenizer), wrapped(about, terms=BLOCKS)
    params = {"model": jax.jit(about.model.init)(jax.random.key(5))}
    given = jax.tree.map(jnp.asarray, batch())
    said = [one.predict(params, one.constants, one.carry(ROWS), given)[1] for one in (plain, task)]
    np.testing.assert_array_equal(said[0]["nll"], said[1]["nll"])
    totals = {name: np.sum(np.asarray(value, np.float64)) for name, value in said[0].items()}
    assert task.summarize(totals) == plain.summarize(totals)


@SLOWLY
def test_it_stacks_with_lora():
    """The thin matrices of converted layers learn; a window's projections have them."""
    about = setting(LOCAL, cfg=SMALL)
    task = Lora(rank=2, paths=("attention/(q|k|v|out)",))(about.kind.make(about.model, about.tokenizer), about)
    task = Distilled(teachers=("runs/teacher",), terms=BLOCKS)(task, about)
    start, _ = trained(task, about.model, steps=0)
    end, _ = trained(task, about.model, steps=20)
    first, last = (flatten(task.export(one.params, task.constants, ())) for one in (start, end))
    moved = {path for path in first if not np.array_equal(first[path], last[path])}
    assert moved == {f"layers/{i}/attention/{name}" for i in (0, 1) for name in ("q", "k", "v", "out")}


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"layers": 1}, {}, r"the student's layers are 1 of width 16, the teacher's 2 of width 16; they are compared"),
        ({}, {"width": 24}, r"the student's layers are 2 of width 16, the teacher's 2 of width 24"),
        ({"attention": "full"}, {}, r"blocks: nothing to convert, all layers have the teacher's attention \('full'\)"),
        ({"positions": "none"}, {"positions": "alibi"}, r"positions are 'none', the teacher's 'alibi', and one"),
    ],
)
def test_students_whose_blocks_cannot_follow(student, teacher, message):
    student = dataclasses.replace(LOCAL, **student)
    with pytest.raises(UserError, match=rf"^config\.distilled\.terms: .*{message}") as caught:
        wrapped(setting(student, cfg=dataclasses.replace(SMALL, **teacher)), terms=BLOCKS)
    assert "\n" not in str(caught.value)


def plain_task():
    about = setting(LOCAL)
    return about.kind.make(about.model, about.tokenizer)


@pytest.mark.parametrize(
    "more",
    [
        {"terms": (*BLOCKS, ("forward_kl", 1.0))},
        {"terms": (("hidden", 1.0), *BLOCKS)},
        {"terms": BLOCKS, "on_policy": {"share": 0.5}},
        {"terms": BLOCKS, "teachers": ("one", "other")},
    ],
)
def test_blocks_learn_nothing_else(more):
    with pytest.raises(UserError, match="'blocks' trains each block by itself: it takes one teacher"):
        Distilled(**{"teachers": ("one",), **more})(plain_task(), setting(LOCAL, cfg=SMALL))


def test_what_else_is_refused():
    with pytest.raises(UserError, match=r"blocks: train: 'everything' is unknown; one of: attention, block"):
        wrapped(setting(LOCAL, cfg=SMALL), terms=(("blocks(train='everything')", 1.0),))
    with pytest.raises(UserError, match=r"all else has to be the teacher's; set config\.init\.source"):
        wrapped(dataclasses.replace(setting(LOCAL, cfg=SMALL), start=""), terms=BLOCKS)
    about = setting(dataclasses.replace(SMALL, attention="linformer(rank=4)"), "masked_language_modeling", cfg=SMALL)
    task = wrapped(about, terms=BLOCKS)
    params = {"model": jax.jit(about.model.init)(jax.random.key(0))}
    given = task.prepare(params, task.constants, jax.tree.map(jnp.asarray, batch("masked_language_modeling")), 0, None)
    with pytest.raises(UserError, match=r"kind 'linformer\(rank=4\)' cannot keep the documents of one row apart"):
        task.loss(params, task.constants, (), given, jnp.int32(0), None)
