"""Learning from a teacher with another tokenizer: neutral at equality, the loss and gradient that it says, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastlm.compress import across_tokenizers
from fastlm.compress.distill import Distilled
from fastlm.compress.lora import Lora
from fastlm.compress.spans import SharedTokens, SpanLikelihood, beginnings, begins, bins_of, totals
from fastlm.errors import UserError
from fastlm.models import Model
from fastlm.ops.paths import flatten
from fastlm.parallel import mesh as meshes
from fastlm.tasks.scoring import to_device
from fastlm.training import precision, state
from fastlm.training.step import make_eval_step, make_train_step
from tests.compress.students import LARGE, LENGTH, SMALL, Stored, setting
from tests.data.pieces import Pieces, packed

OWN, OTHER = Pieces("th", "e ", "an", "é"), Pieces("the ", "nd", "é€", " a", bos=False)
TEXTS = (["the and then", "é€"], ["then the é€", "a"], ["and", "the", "€"], ["an é than the"])
TERMS = (("cross_entropy", 0.3), ("span_likelihood(temperature=2.0)", 0.7), ("shared_tokens(temperature=1.5)", 0.4))
ROWS, THEIRS = len(TEXTS), 24
SLOWLY = pytest.mark.slow


def about(own=OWN, other=OTHER, cfg=LARGE, longest=32, **stored):
    cfg = dataclasses.replace(cfg, vocab_size=other.vocab_size, max_length=longest)
    stored = Stored(cfg, {"name": "language_modeling"}, tokenizer=other, **stored)
    found = setting(dataclasses.replace(SMALL, vocab_size=own.vocab_size), stored=stored)
    return dataclasses.replace(found, tokenizer=own)


def wrapped(about, terms=TERMS, **options):
    plain = about.kind.make(about.model, about.tokenizer)
    options = {"teachers": ("runs/teacher",), "teacher_length": THEIRS, "terms": terms} | options
    return Distilled(**options)(plain, about)


def batch(task, tokenizer=OWN):
    each = [packed(tokenizer, texts, LENGTH) for texts in TEXTS]
    (joined,) = task.join_evaluation([{name: np.concatenate([one[name] for one in each]) for name in each[0]}])
    return {name: value for name, value in joined.items() if name != "document"}


def params_of(about, seed=2):
    return {"model": jax.jit(about.model.init)(jax.random.key(seed))}


def evaluated(task, params, given):
    sums = jax.jit(make_eval_step(task))(params, (), task.constants, task.carry(ROWS), given, jnp.int32(0))[1]
    return task.summarize({name: np.asarray(value, np.float64) for name, value in sums.items()})


def trained(task, model, steps, given=None, accumulation=1):
    optimizer, given = optax.adam(5e-3), given or batch(task)
    scale = precision.loss_scale_for("float32")
    current = state.create(task, model, optimizer, seed=0, rows=ROWS, average=False, loss_scale=scale)
    step = jax.jit(make_train_step(task, optimizer, accumulation=accumulation))
    for _ in range(steps):
        current, metrics = step(current, task.constants, given)
    return current, metrics


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    """With one tokenizer every token is a span, and both terms are 0."""
    same = about(OWN, OWN, cfg=SMALL, longest=LENGTH)
    task = wrapped(same, teacher_length=LENGTH)
    given = batch(task)
    assert given["spans"].max() > 10 and (np.diff(given["spans"], axis=1) <= 1).all()
    np.testing.assert_array_equal(given["spans"] > 0, given["loss_mask"] > 0)
    metrics = evaluated(task, params_of(same, seed=1), given)
    for term in ("span_likelihood", "shared_tokens"):
        assert abs(metrics[f"term_{term}"]) < 1e-5, term
    assert metrics["aligned"] == 1
    assert metrics["teacher_bits_per_aligned_byte"] == pytest.approx(metrics["bits_per_byte"], rel=1e-5)
    assert metrics["bits_per_aligned_byte"] == pytest.approx(metrics["bits_per_byte"], rel=1e-5)


def of_whole_logits(here, task, given):
    """The loss of parameters, from all logits of both models at once."""
    teacher, mask = task.constants["distilled"]["teacher"]["weights"], given["loss_mask"]
    cfg = dataclasses.replace(LARGE, vocab_size=OTHER.vocab_size, max_length=32)
    logs = lambda model, params, prefix="": jax.nn.log_softmax(
        model.apply(
            params["model"],
            given[f"{prefix}tokens"],
            segment_ids=given[f"{prefix}segment_ids"],
            positions=given[f"{prefix}positions"],
        )[0]
    )
    nll = lambda logs, targets: -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    p = logs(Model(cfg, here.model.compute), teacher, "other_")
    count = given["spans"].shape[1]
    bins = bins_of(OWN, OTHER, OWN.vocab_size, OTHER.vocab_size)
    whole = totals(nll(p, given["other_targets"]), given["other_spans"], count)
    places = np.take_along_axis(np.asarray(beginnings(jnp.asarray(given["other_spans"]), count)), given["spans"], 1)
    p_there = jnp.take_along_axis(p, places[..., None], axis=1)

    def loss(params):
        q = logs(here.model, params)
        own = nll(q, given["targets"])
        spans = SpanLikelihood()(whole, totals(own, given["spans"], count), 2.0)
        shared = SharedTokens()(p_there, q, bins, 1.5) * begins(jnp.asarray(given["spans"]))
        return 0.3 * jnp.sum(own * mask) + 0.7 * jnp.sum(spans) + 0.4 * jnp.sum(shared)

    return loss


def test_loss_and_gradient_are_those_of_whole_logits():
    """Chunks that cut spans, and weights of tokens that are known ahead, change nothing; nor does the teacher learn."""
    here = about()
    task = wrapped(here)
    given, params = batch(task), params_of(here)
    assert 0 < given["spans"].max() < (given["loss_mask"] > 0).sum(axis=1).max(), "some spans are longer than a token"
    shapes = {"other_tokens": (ROWS, THEIRS), "spans": (ROWS, LENGTH)}
    assert all(given[name].shape == shape for name, shape in shapes.items())
    expected = jax.jit(jax.value_and_grad(of_whole_logits(here, task, given)))(params)

    def loss(params, taught):
        constants = task.constants | {"distilled": task.constants["distilled"] | {"teacher": taught}}
        return task.loss(params, constants, (), given, 0, None)[0]

    teacher = task.constants["distilled"]["teacher"]
    value, (gradient, towards) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, teacher)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    gradient, wanted = flatten(gradient), flatten(expected[1])
    for path in wanted:
        np.testing.assert_allclose(gradient[path], wanted[path], atol=2e-4, rtol=2e-3, err_msg=path)
    assert all(float(jnp.max(jnp.abs(leaf))) == 0 for leaf in jax.tree.leaves(towards))


def test_what_is_reported_is_of_the_text_that_both_judge():
    here = about()
    task = wrapped(here)
    given = batch(task)
    metrics = evaluated(task, params_of(here), given)
    bytes_of = np.array(OWN.token_bytes)[given["targets"]]
    assert metrics["aligned"] == pytest.approx(
        (bytes_of * (given["spans"] > 0)).sum() / (bytes_of * given["loss_mask"]).sum()
    )
    assert 0.5 < metrics["aligned"] < 1  # the teacher, without a start token, predicts no first token
    per_byte = np.log2(OTHER.vocab_size) * (given["other_spans"] > 0).sum() / (bytes_of * (given["spans"] > 0)).sum()
    assert metrics["teacher_bits_per_aligned_byte"] == pytest.approx(per_byte, rel=0.1)  # it is random
    assert metrics["weight_span_likelihood"] == pytest.approx(0.7)


@pytest.mark.slow
def test_a_student_with_other_tokens_learns_from_a_teacher():
    """The teacher knows these texts; from it alone the student comes to know them too."""
    here = about()
    stored = here.checkpoint("runs/teacher", "")
    teacher = Model(stored.cfg)
    same = dataclasses.replace(here, model=teacher, tokenizer=OTHER)
    knowing, _ = trained(here.kind.make(teacher, OTHER), teacher, 60, batch(wrapped(same), OTHER))
    stored.params = lambda cfg, mesh, seed: knowing.params["model"]
    task = wrapped(here, terms=(("span_likelihood", 1.0), ("shared_tokens", 1.0)))
    start, _ = trained(task, here.model, steps=1)
    end, _ = trained(task, here.model, steps=60)
    before, after = (evaluated(task, one.params, batch(task)) for one in (start, end))
    assert before["teacher_bits_per_aligned_byte"] < 0.5 * before["bits_per_aligned_byte"]
    assert after["bits_per_aligned_byte"] < 0.5 * before["bits_per_aligned_byte"]
    for term in ("span_likelihood", "shared_tokens"):
        assert after[f"term_{term}"] < 0.3 * before[f"term_{term}"], term


@SLOWLY
def test_microbatches_sum_to_the_large_batch():
    here = about()
    task = wrapped(here)
    (whole, metrics), (parts, others) = (trained(task, here.model, 2, accumulation=n) for n in (1, 2))
    for path, leaf in flatten(whole.params).items():
        np.testing.assert_allclose(leaf, flatten(parts.params)[path], atol=1e-4, err_msg=path)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], rtol=1e-3, atol=1e-4, err_msg=name)


@SLOWLY
def test_sharded_equals_unsharded():
    here = about()
    params, given = params_of(here), batch(wrapped(here))
    loss = lambda task: jax.jit(lambda p, c, x: task.loss(p, c, (), x, 0, None)[0])
    alone = wrapped(here)
    expected = loss(alone)(params, alone.constants, given)
    mesh = meshes.make(data=2, fsdp=2, tensor=2)
    cut = wrapped(dataclasses.replace(here, mesh=mesh))
    jax.set_mesh(mesh)
    np.testing.assert_allclose(loss(cut)(params, cut.constants, to_device(given, mesh)), expected, rtol=1e-4)


@SLOWLY
def test_it_stacks_with_lora():
    here = about()
    task = wrapped(here)
    stacked = Lora(rank=2)(task, here)
    start, _ = trained(stacked, here.model, steps=1)
    end, metrics = trained(stacked, here.model, steps=20)
    assert float(metrics["sums/distilled/term/span_likelihood"]) > 0
    view = lambda one: {"model": stacked.export(one.params, stacked.constants, ())}
    before, after = (evaluated(task, view(one), batch(task))["term_span_likelihood"] for one in (start, end))
    assert after < before


def test_rows_of_the_teacher_are_as_long_as_the_texts_need():
    here, other = about(Pieces()), Pieces("abcd")
    length = lambda *texts: across_tokenizers.measured_length(
        dataclasses.replace(here, documents=lambda: [texts, ["ab"][: len(texts) - 1]]), other
    )
    assert length("abcd" * 50) == 8  # a quarter of 16, and some more, in steps of 8
    assert length("efgh" * 50) == 24
    assert length("abcd" * 50, "never read") == 24  # the other source needs more
    with pytest.raises(UserError, match=r"distilled\.teacher_length: there is no text to measure it by; set it"):
        wrapped(here, teacher_length=0)
    long = dataclasses.replace(here, length=64, documents=lambda: [["efgh" * 50]])
    with pytest.raises(UserError, match=r"reads at most 32 tokens, and rows of config\.data\.length=64 need about"):
        wrapped(long, teacher_length=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_length": 33}, r"runs/teacher reads at most 32 tokens, config.distilled.teacher_length is 33; lower"),
        ({"teacher_length": -1}, r"distilled.teacher_length: must be at least 0, got -1"),
        ({"teachers": ("a", "b")}, r"teachers: 'span_likelihood' takes one teacher, got 2"),
        ({"cache": "runs/targets"}, r"distilled.cache: 'span_likelihood' needs the teacher.*; empty it"),
        ({"on_policy": {"share": 0.5}}, r"distilled.on_policy.share: 'span_likelihood' needs .*; set it to 0"),
        ({"terms": (*TERMS, ("forward_kl", 1.0))}, r"'forward_kl' compares place by place, 'span_likelihood' with a"),
        ({"terms": (("shared_tokens", 1.0), ("hidden", 1.0))}, r"'hidden' compares place by place, 'shared_tokens'"),
        ({"terms": (("forward_kl", 1.0),)}, r"has another tokenizer \(.*\('span_likelihood', 0.5\)\)"),
        ({"terms": (("span_likelihood(temperature=0)", 1.0),)}, r"span_likelihood: temperature: must be above 0"),
        ({"terms": (("shared_tokens(divergence='kl')", 1.0),)}, r"shared_tokens: divergence: unknown 'kl'"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(UserError, match=message) as caught:
        wrapped(about(), **options)
    assert "\n" not in str(caught.value)


def test_tokens_have_to_stand_for_text():
    with pytest.raises(UserError, match=r"config\.tokenizer: its tokenizer changes the text"):
        wrapped(about(own=Pieces(lower=True)))
    with pytest.raises(UserError, match=r"teachers: runs/teacher: its tokenizer changes the text"):
        wrapped(about(other=Pieces(lower=True)))
    with pytest.raises(UserError, match=r"only language models learn from spans"):
        wrapped(setting(name="classification"))


def test_a_teacher_that_is_worse_or_hardly_heard_is_said():
    task = wrapped(about())
    good = {"teacher_bits_per_aligned_byte": 1.0, "bits_per_aligned_byte": 1.2, "aligned": 0.9}
    assert task.remarks(good) == ()
    (line,) = task.remarks(good | {"teacher_bits_per_aligned_byte": 1.3, "teacher_loss": 9.0})
    assert "the teacher is worse than the student here (1.3000 against 1.2000 bits per byte)" in line
    (line,) = task.remarks(good | {"aligned": 0.25})
    assert "only 25% of the bytes lie in spans" in line and "teacher_length above 24" in line
