"""Checkpoints: which stay, which is best, what is refused, and that nothing half-written counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.errors import UserError
from fastlm.training import checkpoints
from fastlm.training.checkpoints import Checkpoints
from fastlm.training.precision import LossScale
from fastlm.training.state import Skipped, State

ABOUT = {"model": {}, "tokenizer": "{}", "config": {}, "data": {"0": 1}, "metrics": {}}


def state(value=0.0, average=True):
    zero = jnp.zeros((), jnp.int32)
    params = {"model": {"w": jnp.full((4, 3), value)}}
    return State(
        step=zero,
        params=params,
        optimizer=({"mu": jnp.full(3, value)},),
        compression=(),
        carry=(),
        average=jax.tree.map(lambda w: w / 2, params) if average else (),
        loss_scale=LossScale(),
        rng=jax.random.key_data(jax.random.key(1)),
        skipped=Skipped(zero, zero),
    )


def target(average=True):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    return jax.tree.map(shaped, state(average=average))


def saved(workdir, losses, keep=2, **changes):
    """Saves one checkpoint per loss (None: not evaluated), at steps 1, 2, ..."""
    files = Checkpoints(workdir, keep=keep)
    for step, loss in enumerate(losses, start=1):
        files.save(step, state(float(step)), ABOUT | changes, None if loss is None else {"loss": loss})
    files.wait()
    return files


def test_a_state_comes_back_as_it_was(tmp_path):
    saved(tmp_path, [1.0]).close()
    again = Checkpoints(tmp_path)
    found = again.restore(1, target())
    jax.tree.map(np.testing.assert_array_equal, found, state(1.0))
    assert again.about(1) == ABOUT
    one = again.restore_model(1, target().params["model"])
    np.testing.assert_array_equal(one["w"], np.ones((4, 3)))
    half = again.restore_model(1, target().params["model"], average=True)
    np.testing.assert_array_equal(half["w"], np.full((4, 3), 0.5))


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([3.0, 1.0, 2.0, 4.0], [2, 3, 4], 2),
        ([None, None, None], [2, 3], None),
        ([1.0, None, None, None], [1, 3, 4], 1),
        ([float("nan"), 2.0, float("nan"), 3.0, None], [2, 4, 5], 2),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, losses, kept, best):
    files = saved(tmp_path, losses)
    assert files.steps() == kept
    assert files.best() == best
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept
    files.close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.best() == best, "a resumed run knows the best"
    again.save(len(losses) + 1, state(), ABOUT)
    again.wait()
    assert best is None or best in again.steps()


def test_a_step_that_exists_is_left_as_it_is(tmp_path):
    files = saved(tmp_path, [1.0])
    files.save(1, state(9.0), ABOUT)
    files.wait()
    assert float(files.restore(1, target()).params["model"]["w"][0, 0]) == 1.0


@pytest.mark.parametrize(
    ("asked", "step"), [(None, 3), ("", 3), ("best", 1), (2, 2), ("2", 2), ("02", 2)], ids=lambda value: repr(value)
)
def test_a_step_is_named_in_several_ways(tmp_path, asked, step):
    assert saved(tmp_path, [1.0, 2.0, 3.0]).resolve(asked) == step


def test_steps_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoints folder there"):
        Checkpoints(tmp_path, read_only=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        Checkpoints(tmp_path).resolve(None)
    files = saved(tmp_path, [None])
    for asked in (7, "7", "abc", "-1"):
        with pytest.raises(UserError, match=r"no checkpoint at step .*; choose from \[1\], or 'best'"):
            files.resolve(asked)
    with pytest.raises(UserError, match="none is best"):
        files.resolve("best")


def test_a_run_without_an_average(tmp_path):
    files = Checkpoints(tmp_path)
    files.save(1, state(average=False), ABOUT)
    files.wait()
    assert files.restore(1, target(average=False)).average == ()
    with pytest.raises(UserError, match="kept no averaged weights"):
        files.restore_model(1, target().params["model"], average=True)


def test_a_half_written_checkpoint_does_not_count_and_is_cleared_by_the_run_only(tmp_path):
    saved(tmp_path, [1.0]).close()
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (half / "model").mkdir(parents=True)
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.steps() == [1]
    assert half.is_dir(), "the run that writes it may be alive"
    writer = Checkpoints(tmp_path)
    assert writer.steps() == [1]
    writer.save(2, state(2.0), ABOUT)
    writer.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("key", checkpoints.ABOUT)
def test_a_description_of_another_program_is_refused(tmp_path, key):
    files = saved(tmp_path, [1.0], **{key: 3})
    with pytest.raises(UserError, match=rf"checkpoints/1: written by another program.* lacks {key}"):
        files.about(1)


def test_a_model_of_another_shape_is_refused_and_the_others_are_named(tmp_path):
    files = saved(tmp_path, [1.0, 2.0])
    wrong = jax.tree.map(lambda x: jax.ShapeDtypeStruct((5, 3), x.dtype, sharding=x.sharding), target().params["model"])
    with pytest.raises(UserError, match=r"checkpoints/2: could not read it .*; intact there: \[1\]") as caught:
        files.restore_model(2, wrong)
    assert "\n" not in str(caught.value)


def test_a_workdir_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="could not open it .*no other checkpoint is there"):
        Checkpoints(file)
    assert file.read_text() == "mine"


def test_versions_are_written_down():
    assert {"python", "jax", "flax", "orbax-checkpoint"} <= checkpoints.versions().keys()
