"""Batches that the student writes: the beginning stays, what follows is its own, behind the end nothing counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm import tasks
from fastlm.compress import on_policy
from fastlm.compress.on_policy import OnPolicy
from fastlm.decoding import sample
from fastlm.errors import UserError
from tests.compress.students import LENGTH, ROWS, SMALL, batch, setting, trained, wrapped

GREEDY = 1e-5  # a temperature at which the likeliest token is drawn


def written(name, student=SMALL, **how):
    about = setting(student, name)
    writer = on_policy.make(OnPolicy(share=1.0, **how), about, "here")
    params = jax.jit(about.model.init)(jax.random.key(3))
    params = jax.tree.map(lambda x: 3 * x, params)  # fresh logits are nearly equal
    given = {key: jnp.asarray(value) for key, value in batch(name).items()}
    write = jax.jit(lambda p, x, step: writer({"model": p}, x, step, jax.random.key(0)))
    return about, params, given, write(params, given, 0)


def test_a_language_model_goes_on_from_its_rows_beginnings():
    about, params, given, made = written("language_modeling", prompt=6, temperature=GREEDY)
    np.testing.assert_array_equal(made["tokens"][:, :6], given["tokens"][:, :6])
    rows = [np.asarray(row[:6]) for row in given["tokens"]]
    chunks = sample.generate(about.model, params, rows, max_tokens=LENGTH - 6, how=sample.Sampling(temperature=0))
    expected = np.concatenate(list(chunks), axis=1)
    np.testing.assert_array_equal(made["targets"][:, 5:-1], expected)
    np.testing.assert_array_equal(made["tokens"][:, 1:], made["targets"][:, :-1])
    end = about.tokenizer.eos
    for row in range(ROWS):
        counted = np.asarray(made["loss_mask"][row])
        new = np.asarray(made["targets"][row, 5:])
        length = len(new) if end not in new else list(new).index(end) + 1
        scores = np.asarray(given["loss_mask"][row]).any()  # a row that scored nothing still does not
        np.testing.assert_array_equal(counted, [0] * 5 + [float(scores)] * length + [0] * (len(new) - length))
    np.testing.assert_array_equal(made["segment_ids"], 1)
    np.testing.assert_array_equal(made["written"], 1)


def test_an_encoder_decoder_writes_targets_of_its_sources():
    about, params, given, made = written("sequence_to_sequence", temperature=GREEDY)
    np.testing.assert_array_equal(made["source"], given["source"])
    np.testing.assert_array_equal(made["tokens"][:, 0], given["tokens"][:, 0])
    for row in range(ROWS):
        source = np.asarray(given["source"][row, : given["source_length"][row]])
        start, how = int(given["tokens"][row, 0]), sample.Sampling(temperature=0)
        chunks = sample.generate(about.model, params, [source], max_tokens=LENGTH - 1, how=how, start=start)
        new = np.asarray(made["targets"][row])
        np.testing.assert_array_equal(new[:-1], np.concatenate(list(chunks), axis=1)[0])
        end = about.tokenizer.eos
        length = list(new).index(end) + 1 if end in new else LENGTH
        assert int(made["tokens_length"][row]) == length


def test_a_decoder_of_source_and_target_keeps_each_source():
    about = dataclasses.replace(setting(), kind=tasks.make_kind({"name": "sequence_to_sequence"}))
    writer = on_policy.make(OnPolicy(share=1.0), about, "here")
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 200, (ROWS, LENGTH)).astype(np.int32)
    begins = np.array([3, 5, 9, 14])
    given = {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.roll(jnp.asarray(tokens), -1, 1),
        "tokens_length": jnp.full(ROWS, LENGTH, jnp.int32),
        "scored": jnp.asarray(np.arange(LENGTH) >= begins[:, None], jnp.int32),
        "row_mask": jnp.ones(ROWS),
    }
    params = jax.jit(about.model.init)(jax.random.key(3))
    made = jax.jit(lambda p, x: writer({"model": p}, x, 0, jax.random.key(0)))(params, given)
    for row, begin in enumerate(begins):
        np.testing.assert_array_equal(made["tokens"][row, : begin + 1], tokens[row, : begin + 1])
        assert not np.array_equal(made["tokens"][row, begin + 1 :], tokens[row, begin + 1 :]) or begin == LENGTH - 2
        assert not np.any(made["scored"][row, :begin])
        assert made["scored"][row, begin] == 1


def test_evaluation_and_batches_not_drawn_stay_as_they_are():
    about = setting()
    writer = on_policy.make(OnPolicy(share="linear(start=0.0, end=1.0)"), about, "here")
    params = {"model": jax.jit(about.model.init)(jax.random.key(3))}
    given = {key: jnp.asarray(value) for key, value in batch().items()}
    drawn = jax.jit(lambda step, key: writer(params, given, step, key)["written"][0])
    shares = {step: np.mean([float(drawn(step, jax.random.key(seed))) for seed in range(30)]) for step in (0, 10, 19)}
    assert shares[0] == 0
    assert 0.2 < shares[10] < 0.8
    assert shares[19] == 1
    same = writer(params, given, 19, None)
    for name in given:
        np.testing.assert_array_equal(same[name], given[name])


def test_what_the_student_wrote_is_no_truth():
    """The task's own loss counts nothing of it; the teacher's terms count it."""
    about = setting(steps=30)
    terms = (("cross_entropy", 1.0), ("reverse_kl", 1.0))
    task = wrapped(about, terms=terms, on_policy={"share": 1.0, "prompt": 4})
    _, metrics = trained(task, about.model, steps=3)
    assert float(metrics["sums/tokens"]) == 0
    assert float(metrics["sums/distilled/count"]) > 0
    assert float(metrics["sums/distilled/term/cross_entropy"]) == 0
    assert float(metrics["sums/distilled/term/reverse_kl"]) > 0
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


def test_nothing_written_is_the_program_without_it():
    about = setting()
    plain, never = wrapped(about), wrapped(about, on_policy={"share": 0.0})
    assert plain.prepare is never.prepare or plain.prepare.__code__ is never.prepare.__code__


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("classification", {"share": 0.5}, r"config\.distilled\.on_policy\.share: a model of this task writes no text"),
        ("language_modeling", {"share": 0.5, "prompt": 16}, r"on_policy\.prompt: 16 leaves nothing to write"),
        ("language_modeling", {"share": "sine(start=0, end=1)"}, r"on_policy\.share: unknown schedule 'sine'"),
        ("language_modeling", {"shore": 0.5}, r"on_policy\.shore: no such key; did you mean 'share'"),
        ("language_modeling", {"share": 0.5, "temperature": 0.0}, r"temperature a positive number"),
    ],
)
def test_what_cannot_be_written(name, how, message):
    with pytest.raises(UserError, match=message):
        wrapped(setting(name=name), on_policy=how)
