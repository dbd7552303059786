"""The train step: accumulation, sharding, skipping, loss scaling, averaging, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastlm.models import Compute, Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.tasks import language_modeling
from fastlm.tasks.scoring import to_device
from fastlm.tasks.task import Compression
from fastlm.training import precision, state
from fastlm.training.step import make_eval_step, make_train_step

CFG = ModelConfig(vocab_size=32, max_length=16, layers=2, width=32, heads=4, kv_heads=2)
BYTES = np.ones(32, np.int32)


def make(compute=Compute(), optimizer=None, average=0.0, accumulation=1, cfg=CFG):
    """Returns (step function, fresh state, task)."""
    model = Model(cfg, compute)
    task = language_modeling.make(model, BYTES)
    optimizer = optimizer or optax.adamw(1e-2)
    make_state = lambda: state.create(
        task,
        model,
        optimizer,
        seed=0,
        rows=8,
        average=average > 0,
        loss_scale=precision.loss_scale_for(compute.dtype),
    )
    return make_train_step(task, optimizer, accumulation=accumulation, average_decay=average), make_state, task


def batch(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (rows, 16), dtype=np.int32)
    mask = (rng.random((rows, 16)) < 0.6).astype(np.float32)
    mask[0] = 0  # rows score different numbers of tokens, one scores none
    segments = np.sort(rng.integers(1, 4, (rows, 16)), axis=1).astype(np.int32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": mask, "segment_ids": segments}


def run(step, current, task, steps=3, seed=0):
    step = jax.jit(step)
    for i in range(steps):
        current, metrics = step(current, task.constants, batch(seed + i))
    return current, metrics


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("pieces", [2, 4])
def test_accumulation_equals_the_large_batch_with_unequal_masks(pieces):
    sgd = optax.sgd(0.5)
    step, make_state, task = make(optimizer=sgd)
    whole, metrics = run(step, make_state(), task)
    step, make_state, task = make(optimizer=sgd, accumulation=pieces)
    parts, part_metrics = run(step, make_state(), task)
    assert_close(whole.params, parts.params)
    assert float(metrics["sums/nll"]) == pytest.approx(float(part_metrics["sums/nll"]), rel=1e-5)
    assert float(metrics["sums/tokens"]) == float(part_metrics["sums/tokens"])


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 2, "fsdp": 2, "tensor": 1, "sequence": 2}, marks=pytest.mark.slow),
    ],
)
def test_sharded_equals_unsharded(axes, no_mesh):
    sgd = optax.sgd(0.5, momentum=0.9)
    step, make_state, task = make(optimizer=sgd, accumulation=2)
    alone, metrics = run(step, make_state(), task)
    mesh = meshes.make(**axes)
    jax.set_mesh(mesh)
    placement = state.shardings(jax.eval_shape(make_state), task, mesh)
    current = jax.jit(make_state, out_shardings=placement)()
    q = current.params["model"]["layers"]["0"]["attention"]["q"]
    assert not q.sharding.is_fully_replicated
    assert current.optimizer[0].trace["model"]["layers"]["0"]["attention"]["q"].sharding == q.sharding
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placement, None))
    for i in range(3):
        current, sharded_metrics = jitted(current, task.constants, to_device(batch(i), mesh))
    assert float(sharded_metrics["sums/nll"]) == pytest.approx(float(metrics["sums/nll"]), rel=1e-5)
    assert_close(alone.params, jax.device_get(current.params), 2e-5)


def test_a_trainable_without_axes_is_refused_and_not_replicated_in_silence():
    _, make_state, task = make()
    axes = {path: names for path, names in task.axes.items() if not path.endswith("attention/q")}
    with pytest.raises(KeyError, match="model/layers/0/attention/q .*no logical axes"):
        state.shardings(jax.eval_shape(make_state), dataclasses.replace(task, axes=axes), meshes.make())


def test_it_learns_a_sequence_by_heart():
    step, make_state, task = make()
    jitted, current, data = jax.jit(step), make_state(), batch()
    losses = []
    for _ in range(60):
        current, metrics = jitted(current, task.constants, data)
        losses.append(float(metrics["sums/nll"] / metrics["sums/tokens"]))
    assert losses[0] == pytest.approx(np.log(32), abs=0.1)
    assert losses[-1] < 0.6


def test_a_step_without_finite_gradients_changes_nothing_but_its_counters():
    step, make_state, task = make(average=0.9)
    before, _ = run(step, make_state(), task, steps=1)
    broken = batch(5)
    broken["loss_mask"][1, 1] = np.inf
    after, metrics = jax.jit(step)(before, task.constants, broken)
    same = ("params", "optimizer", "average", "rng")
    for name in same:
        for a, b in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (int(after.step), int(after.skipped.total), int(metrics["skipped_run"])) == (2, 1, 1)
    again, metrics = jax.jit(step)(after, task.constants, broken)
    assert (int(metrics["skipped"]), int(metrics["skipped_run"])) == (2, 2)
    good, metrics = jax.jit(step)(again, task.constants, batch(6))
    assert (int(metrics["skipped"]), int(metrics["skipped_run"])) == (2, 0)
    assert not np.array_equal(good.params["model"]["embedding"]["table"], before.params["model"]["embedding"]["table"])


def test_float16_scales_the_loss_and_backs_off():
    step, make_state, task = make(Compute(dtype="float16"), optax.sgd(0.5))
    exact_step, exact_state, exact_task = make(optimizer=optax.sgd(0.5))
    scaled, metrics = run(step, make_state(), task)
    exact, _ = run(exact_step, exact_state(), exact_task)
    assert float(metrics["loss_scale"]) == 2.0**7
    assert_close(exact.params, scaled.params, 5e-3)
    broken = batch()
    broken["loss_mask"][1, 1] = np.inf
    after, _ = jax.jit(step)(scaled, task.constants, broken)
    assert float(after.loss_scale.value) == 2.0**6
    assert int(after.skipped.total) == 1


def test_loss_scale_grows_after_many_good_steps():
    scale = dataclasses.replace(
        precision.DynamicLossScale.create(8.0), good_steps=jnp.asarray(precision.GROWTH_INTERVAL - 1)
    )
    grown = scale.adjust(jnp.asarray(True))
    assert (float(grown.value), int(grown.good_steps)) == (16.0, 0)
    assert float(grown.adjust(jnp.asarray(False)).value) == 8.0
    np.testing.assert_allclose(scale.unscale({"g": jnp.asarray(scale.scale(3.0))})["g"], 3.0)


def test_average_follows_the_parameters():
    step, make_state, task = make(average=0.5)
    start = make_state()
    one, _ = run(step, start, task, steps=1)
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, start.params, one.params)  # 1/10 at step 0
    assert_close(one.average, expected, 1e-6)
    late = dataclasses.replace(one, step=jnp.asarray(100))
    two, _ = run(step, late, task, steps=1, seed=1)
    assert_close(two.average, jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, one.average, two.params), 1e-6)


def primitives(jaxpr):
    """Names of all primitives in order, those of inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        found.append(str(equation.primitive))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            found += primitives(value) if hasattr(value, "eqns") else []
    return found


def test_a_neutral_compression_agrees_over_twenty_steps():
    """A view and a penalty that are there but change nothing: the same numbers within 1e-6."""
    step, make_state, task = make(optimizer=optax.sgd(0.1))
    neutral = Compression(
        init=lambda params: {"calls": jnp.zeros(())},
        view=lambda params, constants, state, step, rng: jax.tree.map(lambda p: p * 1.0, params),
        penalty=lambda params, state, step: (0.0 * optax.tree.norm(params), {"penalty": jnp.zeros(())}),
        update=lambda params, state, grads, aux, step, rng: (params, {"calls": state["calls"] + 1}),
    )
    with_part = dataclasses.replace(task, compression=neutral)
    state_with = make_state().replace(compression={"calls": jnp.zeros(())})
    plain, _ = run(step, make_state(), task, steps=20)
    wrapped, metrics = run(make_train_step(with_part, optax.sgd(0.1)), state_with, with_part, steps=20)
    assert_close(plain.params, wrapped.params, 1e-6)
    assert float(wrapped.compression["calls"]) == 20
    assert "penalty" in metrics


def test_parts_that_are_off_leave_the_identical_program():
    step, make_state, task = make()
    plain = jax.make_jaxpr(step)(make_state(), task.constants, batch())
    bare = dataclasses.replace(task, compression=Compression())
    off = jax.make_jaxpr(make_train_step(bare, optax.adamw(1e-2)))(make_state(), task.constants, batch())
    assert primitives(plain.jaxpr) == primitives(off.jaxpr)
    smoothed = language_modeling.make(Model(CFG, Compute()), BYTES, label_smoothing=0.1)
    on = jax.make_jaxpr(make_train_step(smoothed, optax.adamw(1e-2)))(make_state(), task.constants, batch())
    assert primitives(plain.jaxpr) != primitives(on.jaxpr)
    averaged_step, averaged_state, _ = make(average=0.5)
    averaged = jax.make_jaxpr(averaged_step)(averaged_state(), task.constants, batch())
    assert len(averaged.eqns) > len(plain.eqns)


def test_state_copies_what_it_starts_from():
    model = Model(CFG)
    task = language_modeling.make(model, BYTES)
    source = model.init(jax.random.key(3))
    current = state.create(
        task, model, optax.sgd(1.0), seed=0, rows=8, average=True, loss_scale=precision.LossScale(), model_params=source
    )
    jitted = jax.jit(make_train_step(task, optax.sgd(1.0), average_decay=0.9), donate_argnums=0)
    jitted(current, task.constants, batch())
    assert np.isfinite(np.asarray(source["embedding"]["table"])).all()


def test_evaluation_is_deterministic_and_sums():
    cfg = dataclasses.replace(CFG, dropout=0.5)
    _, make_state, task = make(cfg=cfg)
    evaluate, current = jax.jit(make_eval_step(task)), make_state()
    one = evaluate(current.params, (), task.constants, (), batch(), 0)[1]
    two = evaluate(current.params, (), task.constants, (), batch(), 0)[1]
    assert {k: float(v) for k, v in one.items()} == {k: float(v) for k, v in two.items()}
    metrics = task.summarize({k: float(v) for k, v in one.items()})
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    assert metrics["bits_per_byte"] == pytest.approx(metrics["loss"] / np.log(2))


def test_predict_gives_per_token_what_loss_sums():
    _, make_state, task = make()
    params, data = make_state().params, batch()
    _, _, (_, aux) = task.loss(params, task.constants, (), data, 0, None)
    _, scores = task.predict(params, task.constants, (), data)
    for name, total in aux["sums"].items():
        np.testing.assert_allclose(jnp.sum(scores[name]), total, rtol=1e-5)
