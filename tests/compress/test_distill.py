"""Distillation as a wrapper: neutral where it should be, aligned by place, no gradient to the teacher, every task."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastlm.compress import teachers
from fastlm.compress.distill import Distilled
from fastlm.compress.lora import Lora
from fastlm.data.tokenizers.byte_level import ByteTokenizer
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.ops.paths import flatten
from fastlm.parallel import mesh as meshes
from fastlm.tasks.scoring import to_device
from fastlm.training import precision, state
from fastlm.training.step import make_eval_step, make_train_step
from tests.compress.students import KINDS, LARGE, LENGTH, ROWS, SMALL, Stored, batch, of, setting, trained, wrapped

SLOWLY = pytest.mark.slow
QUICK = ("language_modeling", "classification")
SOME_AT_ONCE = [name if name in QUICK else pytest.param(name, marks=SLOWLY) for name in sorted(KINDS)]


def prepared(task, name="language_modeling", seed=0):
    """A batch as a step would make it, in evaluation."""
    given = {key: jnp.asarray(value) for key, value in batch(name, seed).items()}
    return task.prepare({}, task.constants, given, 0, None)


def evaluated(task, params, name="language_modeling", step=0):
    step_sums = jax.jit(make_eval_step(task))
    given = {key: jnp.asarray(value) for key, value in batch(name).items()}
    sums = step_sums(params, (), task.constants, task.carry(ROWS), given, jnp.int32(step))[1]
    return task.summarize({key: np.asarray(value, np.float64) for key, value in sums.items()})


@pytest.mark.parametrize("name", SOME_AT_ONCE)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    """KL and all features are zero, of every task; the two losses are one number."""
    features = ("hidden", "hidden(distance='cosine')", "embeddings", "attention", "attention_scores", "relations")
    terms = (("forward_kl", 1.0), ("jensen_shannon", 1.0), *((feature, 1.0) for feature in features))
    about = setting(SMALL, name, cfg=SMALL)
    task = wrapped(about, terms=terms)
    params = {"model": jax.jit(about.model.init)(jax.random.key(1)), "distilled": {}}
    metrics = evaluated(task, params, name)
    distances = [key for key in metrics if key.startswith("term_") and key != "term_cross_entropy"]
    assert len(distances) == 8
    for key in [*distances, "kl"]:
        assert abs(metrics[key]) < 1e-5, (key, metrics[key])
    assert metrics["agreement"] == 1
    assert metrics["teacher_loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert metrics["calibration"] == pytest.approx(metrics["teacher_calibration"], abs=1e-6)


@pytest.mark.parametrize("name", SOME_AT_ONCE)
def test_every_task_is_pulled_towards_the_teacher(name):
    """The sum of KL over places is that of whole logits: student and teacher line up by place."""
    about = setting(SMALL, name)
    task = wrapped(about, terms=(("forward_kl(temperature=1.5)", 1.0),))
    params = {"model": jax.jit(about.model.init)(jax.random.key(2)), "distilled": {}}
    given, own = prepared(task, name), task.predictions
    read = jax.jit(lambda p, c, x: own.read(p, c, (), x, None, ()))(params, task.constants, given)
    kind = about.kind.make(Model(of(name, LARGE)[1], about.model.compute), about.tokenizer)
    teacher = task.constants["distilled"][0]
    theirs = jax.jit(lambda w, c, x: kind.predictions.read(w, c, (), x, None, ()))
    taught = theirs(teacher["weights"], teacher["task"], given)
    logits = [
        one.head(one.head_params(weights), found.hidden)
        for one, weights, found in ((own, params, read), (kind.predictions, teacher["weights"], taught))
    ]
    q, p = (np.asarray(jax.nn.log_softmax(x / 1.5), np.float64) for x in logits)
    mask = np.asarray(read.pieces["mask"], np.float64)
    expected = 1.5**2 * np.sum(mask[..., None] * np.exp(p) * (p - q))
    loss = jax.jit(lambda p, c, x: task.loss(p, c, task.carry(ROWS), x, 0, None)[:2])
    total, count = loss(params, task.constants, given)
    assert float(count) == mask.sum() > 0
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def assert_same(one, other, tolerance):
    one, other = flatten(one), flatten(other)
    for path in one:
        np.testing.assert_allclose(one[path], other[path], atol=tolerance, rtol=0, err_msg=path)


def test_weights_of_zero_leave_plain_training():
    about = setting()
    plain = about.kind.make(about.model, about.tokenizer)
    terms = (("cross_entropy", 1.0), ("forward_kl", 0.0), ("hidden", 0.0))
    without, _ = trained(plain, about.model)
    with_them, metrics = trained(wrapped(about, terms=terms), about.model)
    assert_same(without.params["model"], with_them.params["model"], 1e-6)
    assert float(metrics["sums/distilled/term/forward_kl"]) > 0


def test_the_student_comes_nearer_and_the_teacher_stays():
    about = setting()
    task = wrapped(about, terms=(("forward_kl", 1.0), ("hidden(distance='cosine')", 1.0)))
    before = jax.tree.map(np.array, task.constants)
    slowly = optax.adam(1e-3)
    start, _ = trained(task, about.model, steps=0, optimizer=slowly)
    end, _ = trained(task, about.model, steps=30, optimizer=slowly)
    first, last = (evaluated(task, one.params) for one in (start, end))
    for name in ("kl", "term_hidden"):
        assert last[name] < first[name], name
    assert_same(before, task.constants, 0)
    assert not np.array_equal(*(flatten(one.params)["distilled/hidden/1_2"] for one in (start, end)))


def test_no_gradient_reaches_the_teacher():
    about = setting(cfg=dataclasses.replace(SMALL, layers=4))
    features = ("hidden", "attention", "attention_scores", "relations", "embeddings")
    task = wrapped(about, terms=(("forward_kl", 1.0), *((feature, 1.0) for feature in features)))
    params = {"model": jax.jit(about.model.init)(jax.random.key(2)), "distilled": {}}
    given = prepared(task)

    def loss(params, taught):
        constants = task.constants | {"distilled": taught}
        return task.loss(params, constants, task.carry(ROWS), given, 0, jax.random.key(0))[0]

    floats = task.constants["distilled"]
    own, theirs = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, floats)
    assert all(float(jnp.max(jnp.abs(leaf))) == 0 for leaf in jax.tree.leaves(theirs))
    assert sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(own)) > 1


@SLOWLY
@pytest.mark.parametrize("pieces", [2, 4])
def test_microbatches_sum_to_the_large_batch(pieces):
    about = setting()
    terms = (("cross_entropy", 0.3), ("reverse_kl", 0.7), ("hidden", 0.5), ("relations(of='qv', heads=2)", 0.5))
    task, sgd = wrapped(about, terms=terms), optax.sgd(0.1)
    whole, metrics = trained(task, about.model, steps=2, optimizer=sgd)
    parts, part_metrics = trained(task, about.model, steps=2, accumulation=pieces, optimizer=sgd)
    assert_same(whole.params, parts.params, 1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, part_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_weights_and_temperatures_follow_their_schedules():
    about = setting(steps=11)
    terms = (("cross_entropy", "linear(start=0.0, end=1.0)"), ("forward_kl(temperature='cosine(start=2, end=1)')", 0.5))
    task = wrapped(about, terms=terms)
    params = {"model": jax.jit(about.model.init)(jax.random.key(2)), "distilled": {}}
    at = {step: evaluated(task, params, step=step) for step in (0, 5, 10, 50)}
    assert [round(at[step]["weight_cross_entropy"], 5) for step in (0, 5, 10, 50)] == [0, 0.5, 1, 1]
    warm, cold = (
        evaluated(wrapped(about, terms=((f"forward_kl(temperature={t})", 1.0),)), params)["term_forward_kl"]
        for t in (2, 1)
    )
    assert at[0]["term_forward_kl"] == pytest.approx(warm, rel=1e-5)
    assert at[10]["term_forward_kl"] == pytest.approx(cold, rel=1e-5)
    assert at[0]["kl"] == pytest.approx(cold, rel=1e-4)  # what evaluation reports is at a temperature of 1


@SLOWLY
def test_two_teachers_are_the_mean_of_their_probabilities():
    about = setting()
    stored = {name: Stored(LARGE, {"name": "language_modeling"}, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    about = dataclasses.replace(about, checkpoint=lambda workdir, step: stored[workdir])
    plain = about.kind.make(about.model, about.tokenizer)
    params = {"model": jax.jit(about.model.init)(jax.random.key(2)), "distilled": {}}
    value = {}
    for names in (("a",), ("b",), ("a", "b"), ("a", "a")):
        task = Distilled(teachers=names, terms=(("forward_kl", 1.0),))(plain, about)
        value[names] = evaluated(task, params)["kl"]
    assert value["a", "a"] == pytest.approx(value["a",], rel=1e-5)
    assert value["a", "b"] < (value["a",] + value["b",]) / 2  # KL is convex


@SLOWLY
def test_a_teacher_in_eight_bits_says_nearly_the_same():
    wide = dataclasses.replace(LARGE, width=64)
    about = setting(cfg=wide)
    params = {"model": jax.jit(about.model.init)(jax.random.key(2)), "distilled": {}}
    terms = (("forward_kl", 1.0),)
    whole, rounded = (wrapped(about, terms=terms, weights=weights) for weights in ("", "int8"))
    size = lambda task: sum(leaf.nbytes for leaf in jax.tree.leaves(task.constants["distilled"]))
    assert size(rounded) < 0.6 * size(whole)
    assert evaluated(rounded, params)["kl"] == pytest.approx(evaluated(whole, params)["kl"], rel=0.02)


@SLOWLY
def test_memory_goes_on_from_row_to_row_in_both():
    """A teacher that carries a memory reads the second batch differently than the first."""
    carrying = dataclasses.replace(LARGE, attention="transformer_xl(memory=8)")
    about = setting(dataclasses.replace(SMALL, attention="local(window=4)"), cfg=carrying)
    task = wrapped(about, terms=(("forward_kl", 1.0),))
    params = {"model": jax.jit(about.model.init)(jax.random.key(2)), "distilled": {}}
    given = {key: jnp.asarray(value) for key, value in batch().items()} | {"reset": jnp.zeros(ROWS, bool)}
    given["segment_ids"] = jnp.ones_like(given["segment_ids"])
    given["positions"] = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    losses, carry = [], task.carry(ROWS)
    loss = jax.jit(lambda carry: task.loss(params, task.constants, carry, given, 0, None))
    for _ in range(2):
        total, _, (carry, _) = loss(carry)
        losses.append(float(total))
    assert jax.tree.structure(carry) == jax.tree.structure(task.carry(ROWS))
    assert losses[0] != losses[1]
    carried, _ = jax.eval_shape(task.predict, params, task.constants, carry, given)
    assert jax.tree.structure(carried) == jax.tree.structure(carry)


@SLOWLY
@pytest.mark.parametrize("lora_first", [True, False])
def test_it_stacks_with_lora(lora_first):
    about = setting()
    task = about.kind.make(about.model, about.tokenizer)
    wrappers = [Lora(rank=2), Distilled(teachers=("t",), terms=(("forward_kl", 1.0), ("hidden", 0.1)))]
    for wrapper in wrappers if lora_first else wrappers[::-1]:
        task = wrapper(task, about)
    start, _ = trained(task, about.model, steps=0)
    end, _ = trained(task, about.model, steps=20)
    assert evaluated_kl(task, end) < evaluated_kl(task, start)
    exported = task.export(end.params, task.constants, ())
    assert set(exported) == set(end.params["model"])
    assert all(path in task.axes for path in flatten(end.params))


def evaluated_kl(task, current):
    step = jax.jit(make_eval_step(task))
    sums = step(current.params, current.compression, task.constants, task.carry(ROWS), batch(), jnp.int32(0))[1]
    return float(sums["distilled/kl"])


@SLOWLY
def test_sharded_equals_unsharded():
    about = setting()
    terms = (("cross_entropy", 0.5), ("forward_kl(temperature=2.0)", 0.5), ("hidden", 0.5))
    alone, _ = trained(wrapped(about, terms=terms), about.model, steps=2)
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    task = wrapped(dataclasses.replace(about, mesh=mesh), terms=terms)
    jax.set_mesh(mesh)
    optimizer, scale = optax.adam(1e-2), precision.loss_scale_for("float32")
    create = lambda: state.create(task, about.model, optimizer, seed=0, rows=ROWS, average=False, loss_scale=scale)
    placed = state.shardings(jax.eval_shape(create), task, mesh)
    current = jax.jit(create, out_shardings=placed)()
    step = jax.jit(make_train_step(task, optimizer), out_shardings=(placed, None))
    for number in range(2):
        current, _ = step(current, task.constants, to_device(batch(seed=number), mesh))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(task.constants["distilled"]))
    assert_same(alone.params, current.params, 2e-5)


def test_a_fingerprint_is_of_the_weights_not_of_their_place():
    params = jax.jit(Model(SMALL).init)(jax.random.key(0))
    mine = teachers.fingerprint_of(SMALL, params)
    assert mine == teachers.fingerprint_of(SMALL, jax.tree.map(lambda x: jax.device_put(x, jax.devices()[3]), params))
    changed = jax.tree.map(jnp.copy, params)
    changed["layers"]["0"]["attention"]["q"] = changed["layers"]["0"]["attention"]["q"].at[3, 4].add(1e-7)
    assert mine != teachers.fingerprint_of(SMALL, changed)
    assert mine != teachers.fingerprint_of(dataclasses.replace(SMALL, norm_epsilon=1e-6), params)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((("forward_kl(temperature=0)", 1.0),), r"forward_kl: temperature: must be above 0 and finite, got 0"),
        ((("forward_kl(temperature='linear(start=1, end=0)')", 1.0),), r"temperature: must be above 0"),
        ((("forward_kl", float("nan")),), r"weight of 'forward_kl': must be at least 0 and finite, got nan"),
        ((("forward_kl", "cosinus(start=1, end=0)"),), r"unknown schedule 'cosinus'; did you mean 'cosine'"),
        ((("foward_kl", 1.0),), r"distilled\.terms: unknown term 'foward_kl'; did you mean 'forward_kl'"),
        ((("jensen_shannon(beta=1.5)", 1.0),), r"jensen_shannon: beta must lie in \[0, 1\], got 1.5"),
        ((("hidden(layers=((1, 5),))", 1.0),), r"\(1, 5\) asks for layer 5 of the teacher, which has 0 to 4"),
        ((("hidden(layers=((3, 4),))", 1.0),), r"\(3, 4\) asks for layer 3 of the student, which has 0 to 2"),
        ((("hidden(layers='middle')", 1.0),), r"layers: 'evenly', 'last', or pairs"),
        ((("hidden(distanse='mse')", 1.0),), r"no such key; did you mean 'distance'"),
        ((("attention_scores(layers=((0, 1),))", 1.0),), r"\(0, 1\) asks for layer 0 of the student, which has 1 to 2"),
        ((("relations(heads=5)", 1.0),), r"5 heads do not divide the 16 numbers of the student's 'q'"),
        ((("hidden(stack='encoder')", 1.0),), r"'encoder' is of encoder-decoders"),
        ((("cross_entropy", 1.0), ("cross_entropy", 1.0)), r"'cross_entropy' is there twice"),
    ],
)
def test_terms_that_cannot_be(terms, message):
    with pytest.raises(UserError, match=message) as caught:
        wrapped(setting(), terms=terms)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"cfg": dataclasses.replace(LARGE, max_length=8)}, r"reads at most 8 tokens, rows have config.data.length=16"),
        ({"stored": Stored(*of("classification", LARGE)[::-1])}, r"was trained for something else: Classification"),
        ({"cfg": dataclasses.replace(LARGE, heads=3)}, r"has 2 heads, layer 2 of the teacher 3; use 'relations'"),
    ],
)
def test_teachers_that_cannot_teach(teacher, message):
    with pytest.raises(UserError, match=message):
        wrapped(setting(**teacher), terms=(("attention", 1.0),))


def test_labels_and_tokenizers_have_to_be_the_students():
    about = setting(name="classification")
    other = Stored(of("classification", LARGE)[1], {"name": "classification", "labels": ("b", "a", "c")})
    with pytest.raises(UserError, match=r"its labels are b, a, c, here a, b, c; set config.task.labels"):
        wrapped(dataclasses.replace(about, checkpoint=lambda workdir, step: other))

    class Other(ByteTokenizer):
        def to_json(self):
            return json.dumps({"kind": "other"})

    about = setting(tokenizer=Other())
    with pytest.raises(UserError, match=r"--config\.tokenizer\.kind=checkpoint --config\.tokenizer\.path=runs/teacher"):
        wrapped(about)


def test_a_teacher_that_does_not_fit_says_how_much_is_missing(monkeypatch):
    monkeypatch.setattr(teachers.memory, "free_bytes", lambda: 1000)
    with pytest.raises(
        UserError, match=r"needs 0\.00 GiB of memory and 0\.00 GiB are free, .* GiB too few; cut it over"
    ):
        wrapped(setting())


def test_a_teacher_worse_than_its_student_is_said():
    task = wrapped(setting())
    assert task.remarks({"loss": 2.0, "teacher_loss": 1.0}) == ()
    assert (
        "the teacher is worse than the student here (3.0000 against 2.0000 nats)"
        in task.remarks({"loss": 2.0, "teacher_loss": 3.0})[0]
    )


def test_nobody_to_learn_from():
    with pytest.raises(UserError, match=r"config\.distilled\.teachers: nobody to learn from"):
        Distilled()
