"""Targets from disk in the teacher's place: all kept they are the teacher, sampled they are it on average."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.compress import cached, teachers
from fastlm.compress.distill import Distilled
from fastlm.data.targets import manifest
from fastlm.data.targets.manifest import Key, Manifest
from fastlm.errors import UserError
from fastlm.ops import sparse_targets
from tests.compress.students import ROWS, SMALL, VOCAB, batch, of, setting, wrapped

ONLY_CACHED = (("cross_entropy", 0.25), ("cached_kl", 0.75))


def key(about, method="sampled(draws=9)", teacher=None, vocab_size=VOCAB):
    if teacher is None:
        teacher = teachers.load(about, "runs/teacher", "", "", "").fingerprint
    return Key(teacher, about.tokenizer.fingerprint, vocab_size, method, {"batch_size": ROWS})


def folder(path, key):
    path.mkdir(exist_ok=True)
    Manifest(key, ("tokens",), 16, 16, 1).save(path)
    return str(path)


def targets_by(about, method, vocab_size=VOCAB):
    """first row's number -> a batch with the arrays that the store would add; other numbers are other draws"""
    teacher = teachers.load(about, "runs/teacher", "", "", "")
    teach = cached.teaching(teacher, sparse_targets.make(method), seed=0, vocab_size=vocab_size)
    given = {name: jnp.asarray(value) for name, value in batch().items()}

    def made(first=0):
        kept = teach(given | {"row": first + jnp.arange(ROWS)})
        return given | {
            "target_ids": kept.ids,
            "target_weights": kept.weights,
            "target_entropy": kept.entropy,
        }

    return made


def student(about, path, **options):
    plain = about.kind.make(about.model, about.tokenizer)
    options = {"teachers": (), "cache": path, "terms": ONLY_CACHED} | options
    return Distilled(**options)(plain, about)


def loss_and_gradient(task, params, given):
    def loss(params):
        total, _, (_, aux) = task.loss(params, task.constants, task.carry(ROWS), given, 0, jax.random.key(0))
        return total, aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def test_with_every_token_kept_it_is_the_live_teacher(tmp_path):
    about = setting()
    given = targets_by(about, f"top_k(k={VOCAB})")()
    np.testing.assert_allclose(jnp.sum(given["target_weights"], -1), 1, rtol=1e-5)
    task = student(about, folder(tmp_path / "targets", key(about)))
    live = wrapped(about, terms=(("cross_entropy", 0.25), ("forward_kl", 0.75)))
    assert task.constants["distilled"] == () and live.constants["distilled"] != ()
    params = {"model": jax.jit(about.model.init)(jax.random.key(2))}
    (total, aux), gradient = loss_and_gradient(task, params, given)
    (wanted, _), wanted_gradient = loss_and_gradient(live, params, given)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient)):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert float(aux["sums"]["distilled/term/cached_kl"]) > 0


def test_samples_are_the_teacher_on_average_and_the_likeliest_alone_are_not(tmp_path):
    """Over many draws the loss is that of the whole distribution; the top eight's is another, and stays it."""
    about = setting()
    params = {"model": jax.tree.map(lambda x: 4 * x, jax.jit(about.model.init)(jax.random.key(2)))}
    task = student(about, folder(tmp_path / "targets", key(about)), terms=(("cached_kl", 1.0),))
    loss = jax.jit(lambda given: task.loss(params, task.constants, task.carry(ROWS), given, 0, jax.random.key(0))[0])
    whole, draw = float(loss(targets_by(about, f"top_k(k={VOCAB})")())), targets_by(about, "sampled(draws=8)")
    drawn = np.array([float(loss(draw(100 * number))) for number in range(24)])
    error = drawn.std(ddof=1) / np.sqrt(len(drawn))
    assert abs(drawn.mean() - whole) < 4 * error
    assert abs(float(loss(targets_by(about, "top_k(k=8)")())) - whole) > 8 * error


def test_no_token_is_kept_that_the_student_does_not_have():
    """A teacher whose vocabulary is padded further: what is kept sums to 1 over what both have."""
    kept = targets_by(setting(), "top_k(k=200)", vocab_size=200)()
    assert int(jnp.max(kept["target_ids"])) < 200
    np.testing.assert_allclose(jnp.sum(kept["target_weights"], -1), 1, rtol=1e-5)


def test_evaluation_has_no_targets_and_needs_none(tmp_path):
    about = setting()
    task = student(about, folder(tmp_path / "targets", key(about)))
    params = {"model": jax.jit(about.model.init)(jax.random.key(2))}
    given = {name: jnp.asarray(value) for name, value in batch().items()}
    _, _, (_, aux) = jax.eval_shape(lambda p: task.loss(p, task.constants, task.carry(ROWS), given, 0, None), params)
    assert "nll" in aux["sums"] and "distilled/term/cached_kl" not in aux["sums"]


def test_the_cache_is_checked_against_the_config(tmp_path):
    about = setting()
    good = folder(tmp_path / "good", key(about))
    assert student(about, good, teachers=("runs/teacher",)).origins == {
        "runs/teacher, step 7": teachers.load(about, "runs/teacher", "", "", "").fingerprint
    }
    foreign = folder(tmp_path / "foreign", key(about, teacher="0" * 32))
    with pytest.raises(UserError, match=r"holds targets of another teacher than runs/teacher, step 7 is today"):
        student(about, foreign, teachers=("runs/teacher",))
    wide = folder(tmp_path / "wide", key(about, vocab_size=VOCAB + 7))
    with pytest.raises(UserError, match=r"over 264 tokens, the student has 257; set config.model.vocab_size"):
        student(about, wide)
    with pytest.raises(UserError, match=r"no cached targets there \(manifest.json is missing\)"):
        student(about, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"distilled\.cache: no term reads it; add \('cached_kl', weight\)"):
        student(about, good, terms=(("cross_entropy", 1.0),))
    with pytest.raises(UserError, match=r"'forward_kl' needs a live teacher; name one, or use 'cached_kl' alone"):
        student(about, good, terms=(*ONLY_CACHED, ("forward_kl", 1.0)))
    with pytest.raises(UserError, match=r"cache: knows nothing of what the student writes; empty it"):
        student(about, good, on_policy={"share": 0.5})
    with pytest.raises(UserError, match=r"'cached_kl' needs config\.distilled\.cache"):
        wrapped(about, terms=ONLY_CACHED)
    task, cfg = of("masked_language_modeling", SMALL)
    masked = setting(name=task["name"])
    assert masked.model.cfg == cfg
    with pytest.raises(UserError, match=r"only language models learn from cached targets"):
        student(masked, good)


def test_joining_asks_for_the_runs_own_data_and_steps(tmp_path):
    """What the store is opened with: this run's data, so that targets of other batches are refused by name."""
    about = setting(steps=4)
    task = student(about, folder(tmp_path / "targets", key(about)))

    batches = types.SimpleNamespace(identity={"batch_size": ROWS, "data": "other"})
    with pytest.raises(UserError, match=r"another data\.data: None, here it is other"):
        task.join(batches)
    batches.identity = {"batch_size": ROWS}
    with pytest.raises(UserError, match=r"cut short: 0 of \d+ rows are there"):
        task.join(batches)
    assert manifest.load(tmp_path / "targets").steps == 16
    longer = student(dataclasses.replace(about, steps=40), str(tmp_path / "targets"))
    with pytest.raises(UserError, match=r"are for 16 steps, 40 are needed"):
        longer.join(batches)
