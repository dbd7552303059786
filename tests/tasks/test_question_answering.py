"""Extractive question answering: spans, cloze questions, windows, bad rows, and that it learns."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.settings import Data, Evaluation
from fastlm.data.tokenizers import byte_level
from fastlm.errors import UserError
from fastlm.models import Model, ModelConfig
from fastlm.parallel import mesh as meshes
from fastlm.tasks import cloze
from fastlm.tasks import question_answering as qa
from fastlm.tasks.context_windows import WHERE, Windowing
from fastlm.tasks.kind import Trained
from fastlm.tasks.rows import row_layout
from fastlm.tasks.scoring import evaluate
from fastlm.training import precision, state
from fastlm.training.step import make_eval_step, make_train_step
from tests.tasks.unlabelled import says_the_same

TOKENIZER = byte_level.ByteTokenizer()
KIND = qa.QuestionAnswering(stride=6, most_answer_tokens=4)
CFG = ModelConfig(
    family="encoder", head="none", vocab_size=260, max_length=32, layers=1, width=32, heads=2, token_types=2
)
EVALUATION = Evaluation(batch_size=8)
ASK = jax.jit(cloze.ask, static_argnums=3)


def data(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ((f"jsonl:{path}", 1.0),)
    return Data(sources=sources, length=28, batch_size=8, data_dir=str(folder / "data"), prefetch=0)


@pytest.fixture
def rows(tmp_path):
    """The answer is the number in the context; half of the contexts need several windows."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(64):
        letters = "".join(rng.choice(list("abcdé "), int(rng.integers(6, 40))))
        start, answer = int(rng.integers(1, len(letters))), str(rng.integers(10, 1000))
        context = f"{letters[:start]}{answer}{letters[start:]}"
        split = "test" if i >= 48 else "train"
        made.append({"split": split, "question": "7?", "context": context, "answer": answer, "answer_start": start})
    return data(tmp_path, made)


def test_it_learns_and_says_what_stands_in_the_text(rows, tmp_path):
    cfg = KIND.fit(CFG, TOKENIZER, rows)
    assert (cfg.head, cfg.classes) == ("tokens", 2)
    model = Model(cfg)
    task, optimizer = KIND.make(model, TOKENIZER), optax.adam(1e-2)
    current = state.create(
        task, model, optimizer, seed=0, rows=8, average=False, loss_scale=precision.loss_scale_for("float32")
    )
    step, batches = jax.jit(make_train_step(task, optimizer)), KIND.train_batches(cfg, TOKENIZER, rows, 0)
    for _ in range(100):
        batch = {k: v for k, v in next(batches).items() if k not in ("record", "epoch")}
        current, _ = step(current, task.constants, batch)
    batches.close()

    trained = Trained(model, task, current.params, TOKENIZER, meshes.make())
    scored = KIND.score(trained, rows, EVALUATION, "test")
    assert scored.metrics["questions"] == 16 == len(scored.outputs)
    assert scored.metrics["exact_match"] > 0.7, scored.metrics
    right = [output["said"] == output["expected"] for output in scored.outputs]
    assert scored.metrics["exact_match"] == pytest.approx(np.mean(right))
    assert scored.metrics["f1"] >= scored.metrics["exact_match"]
    assert says_the_same(KIND, trained, rows, EVALUATION, scored, tmp_path)
    loaded = KIND.load(rows, "test")[0][0]
    for output, row in zip(scored.outputs, loaded, strict=True):
        assert output["expected"] == str(row["answer"])
        assert output["said"] in row["context"] and output["context"] in row["context"]

    batches = list(KIND.eval_batches(cfg, TOKENIZER, rows, EVALUATION, "test", 0))
    windows = sum(int((batch["record"] >= 0).sum()) for batch in batches)
    assert windows > 20  # more than questions: long contexts were cut
    metrics = evaluate(jax.jit(make_eval_step(task)), task, current.params, (), current.step, batches, trained.mesh)
    assert metrics["loss"] < 1
    assert metrics["span_accuracy"] > 0.7


@settings(max_examples=10)
@given(seed=st.integers(0, 100), most=st.sampled_from([1, 3, 12]))
def test_the_best_span_is_the_best_of_all(seed, most):
    start, end = np.random.default_rng(seed).normal(size=(2, 3, 10)).astype(np.float32)
    score, first, last = qa.best_spans(jnp.asarray(start), jnp.asarray(end), most)
    for row in range(3):
        spans = {(i, j): start[row, i] + end[row, j] for i in range(10) for j in range(i, min(10, i + most))}
        best = max(spans, key=spans.get)
        assert (int(first[row]), int(last[row])) == best
        assert float(score[row]) == pytest.approx(float(spans[best]), rel=1e-6)


def test_only_the_context_can_hold_an_answer():
    """Whatever the logits are, spans lie in the context, and the loss sees the context and place 0 only."""
    cfg = dataclasses.replace(CFG, head="tokens", classes=2)
    model = Model(cfg)
    task, params = qa.make(model, 5), {"model": model.init(jax.random.key(0))}
    params["model"]["head"]["kernel"] *= 1000
    windows = [Windowing(TOKENIZER, 28, 0).window("what?", text, 0) for text in ("abc", "é", "abcdefgh", "")]
    batch = {
        "tokens": jnp.asarray(np.stack([np.pad(w.tokens, (0, 28 - len(w.tokens))) for w in windows])),
        "tokens_length": jnp.asarray([len(w.tokens) for w in windows]),
        "context_first": jnp.asarray([w.context_first for w in windows]),
        "context_stop": jnp.asarray([w.context_stop for w in windows]),
        "answer_first": jnp.zeros(4, jnp.int32),
        "answer_last": jnp.zeros(4, jnp.int32),
        "row_mask": jnp.ones(4),
    }
    _, found = jax.jit(task.predict)(params, {}, (), batch)
    for w, first, last in list(zip(windows, found["first"], found["last"]))[:3]:
        assert w.context_first <= first <= last < w.context_stop
    assert found["score"][3] < -1e8  # nothing to choose from
    params["model"]["head"]["kernel"] *= 0
    _, _, (_, aux) = jax.jit(lambda p, b: task.loss(p, {}, (), b, 0, None))(params, batch)
    sizes = [w.context_stop - w.context_first + 1 for w in windows]
    assert float(aux["sums"]["nll"]) == pytest.approx(np.sum(np.log(sizes)), rel=1e-5)


def test_the_best_window_of_each_question_is_taken():
    rows = [{WHERE: "row 0"}, {WHERE: "row 0"}, {WHERE: "row 1"}, {WHERE: "row 0"}]
    found = [
        {"score": np.float32(s), "first": np.int32(i), "last": np.int32(i + 1)} for i, s in enumerate((1, 3, -2, 2))
    ]
    spans = qa.best_windows(rows, found)
    assert [(span.row[WHERE], span.score, span.first, span.last) for span in spans] == [
        ("row 0", 3.0, 1, 2),
        ("row 1", -2.0, 2, 3),
    ]


def asked(share, seed=0):
    texts = {"what is it?": "the quick brown fox jumps over the dog", "?": "abcdefgh", "a long question": "xyz"}
    windows = [Windowing(TOKENIZER, 64, 0).window(q, c, 0) for q, c in texts.items()]
    first, stop = (jnp.asarray([w[field] for w in windows]) for field in (2, 3))
    batch = {
        "tokens": jnp.asarray(np.stack([np.pad(w.tokens, (0, 64 - len(w.tokens))) for w in windows])),
        "tokens_length": stop + 1,
        "context_first": first,
        "context_stop": stop,
        "answer_first": first,
        "answer_last": first,
    }
    gap = jnp.asarray(TOKENIZER.encode("__"))
    return batch, ASK(batch, jax.random.key(seed), gap, row_layout(TOKENIZER, 2), share)


def cloze_parts(made):
    """The question, the answer and the context of the first row, as texts; checks that it is laid out as a row."""
    tokens = np.asarray(made["tokens"][0])
    first, stop, start, last, length = (
        int(made[name][0]) for name in ("context_first", "context_stop", "answer_first", "answer_last", "tokens_length")
    )
    assert first <= start <= last < stop == length - 1
    assert tokens[[0, first - 1, stop]].tolist() == [TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.eos]
    assert not tokens[length:].any()
    return (
        TOKENIZER.decode(tokens[part]) for part in (slice(1, first - 1), slice(start, last + 1), slice(first, stop))
    )


@settings(max_examples=12)
@given(seed=st.integers(0, 1000))
def test_a_cloze_question_is_what_stands_around_its_answer(seed):
    batch, made = asked(1.0, seed)
    question, answer, context = cloze_parts(made)
    before, after = question.split("__")
    assert 1 <= len(answer) <= cloze.LONGEST_ANSWER and before and after
    assert f"{before}{answer}{after}" in context
    assert context in "the quick brown fox jumps over the dog"
    for row in (1, 2):  # a question too short for a gap, a context too short for a question
        for name in batch:
            np.testing.assert_array_equal(made[name][row], batch[name][row])


def test_cloze_asks_everywhere_in_contexts_of_all_lengths():
    questions, answers, contexts = zip(*(cloze_parts(asked(1.0, seed)[1]) for seed in range(150)))
    lengths = [len(context) for context in contexts]
    assert min(lengths) < 16 and max(lengths) > 34 and 15 < np.median(lengths) < 25
    assert {len(answer) for answer in answers} == set(range(1, cloze.LONGEST_ANSWER + 1))
    assert {question.index("__") for question in questions} == set(range(1, 9))
    assert len({context[:4] for context in contexts}) > 15


def test_cloze_asks_a_share_of_the_rows_in_training_only():
    batch, made = asked(0.0)
    assert all(np.array_equal(made[name], batch[name]) for name in batch)
    changed = [not np.array_equal(asked(0.3, seed)[1]["tokens"], batch["tokens"]) for seed in range(60)]
    assert 8 < sum(changed) < 30
    model = Model(dataclasses.replace(CFG, head="tokens", classes=2))
    task = qa.QuestionAnswering(cloze=1.0, gap="_").make(model, TOKENIZER)
    assert task.prepare({}, {}, batch, 0, None) is batch
    assert not np.array_equal(task.prepare({}, {}, batch, 0, jax.random.key(0))["tokens"], batch["tokens"])


def row(**changes):
    return {"split": "train", "question": "?", "context": "one two", "answer": "two", "answer_start": 4} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer_start": 3}, "row 1 of .*: 'two' does not stand at answer_start 3 of its context"),
        ({"answer_start": -4}, "'two' does not stand at answer_start -4"),
        ({"answer_start": 400}, "'two' does not stand at answer_start 400"),
        ({"answer": "tw\no"}, r"'tw\\no' does not stand"),
        ({"answer": " "}, "row 1 of .* has an empty answer; .*unanswerable=True"),
    ],
)
def test_bad_rows_are_named(tmp_path, changes, message):
    made = data(tmp_path, [row(), row(**changes)])
    with pytest.raises(UserError, match=message) as raised:
        KIND.train_batches(KIND.fit(CFG, TOKENIZER, made), TOKENIZER, made, 0)
    assert "\n" not in str(raised.value)


def test_a_start_that_is_no_number_is_named(tmp_path):
    made = data(tmp_path, [row(answer_start="4"), row(answer_start="four")])
    with pytest.raises(UserError, match="row 1 of .*: answer_start 'four' is no whole number"):
        KIND.train_batches(KIND.fit(CFG, TOKENIZER, made), TOKENIZER, made, 0)


def test_questions_without_an_answer(tmp_path):
    """They train towards place 0; where place 0 wins, nothing is said, and that is right."""
    made = data(tmp_path, [row(split="test"), row(split="test", answer="", answer_start=-1)])
    kind = dataclasses.replace(KIND, unanswerable=True)
    cfg = kind.fit(CFG, TOKENIZER, made)
    batch = next(kind.eval_batches(cfg, TOKENIZER, made, EVALUATION, "test", 0))
    places = dict(zip(batch["record"].tolist(), zip(batch["answer_first"].tolist(), batch["answer_last"].tolist())))
    first = int(batch["context_first"][0])
    assert places[0] == (first + 4, first + 6) and places[1] == (0, 0)

    model = Model(cfg)
    params = model.init(jax.random.key(0))
    trained = Trained(model, kind.make(model, TOKENIZER), {"model": params}, TOKENIZER, meshes.make())
    said = lambda kind: [o["said"] for o in kind.score(trained, made, EVALUATION, "test").outputs]
    params["head"] = jax.tree.map(jnp.zeros_like, params["head"])
    assert said(kind) == ["", ""]  # nothing beats place 0
    scored = kind.score(trained, made, EVALUATION, "test")
    assert scored.metrics["exact_match"] == 0.5 and scored.outputs[1]["expected"] == ""


def test_the_best_of_several_reference_answers_counts(tmp_path, monkeypatch):
    answers = {"text": ["two", "one two", "two"], "start": [4, 0, 4]}
    made = [row(split="test", answers=answers), row(split="test", answers={"text": ["two"], "start": [4]})]
    made = data(tmp_path, made)
    kind = dataclasses.replace(KIND, answer="answers/text", answer_start="answers/start")
    windows = list(kind.rows(CFG, TOKENIZER, made, "test")[0][0])
    monkeypatch.setattr(qa.QuestionAnswering, "say", lambda *a, **b: (windows, [{"said": "One two."}] * 2))
    scored = kind.score(None, made, EVALUATION, "test")
    assert scored.metrics["exact_match"] == 0.5
    assert scored.metrics["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert [output["expected"] for output in scored.outputs] == ["two", "two"]
    assert [output.get("or") for output in scored.outputs] == [["one two"], None]


def test_settings_that_cannot_be(rows):
    for changes, message in (
        ({"stride": -1}, "stride: must be at least 0"),
        ({"most_answer_tokens": 0}, "most_answer_tokens: must be at least 1"),
        ({"cloze": 1.5}, "cloze must lie in"),
        ({"gap": ""}, "gap be a text"),
    ):
        with pytest.raises(UserError, match=message):
            qa.QuestionAnswering(**changes)
    with pytest.raises(UserError, match=r"config\.task\.stride: windows share 32 tokens"):
        qa.QuestionAnswering(stride=32).fit(CFG, TOKENIZER, rows)
    with pytest.raises(UserError, match="'decoder' cannot do this task"):
        KIND.fit(ModelConfig(vocab_size=300), TOKENIZER, rows)
    with pytest.raises(UserError, match="no field 'contxt'.*did you mean 'context'"):
        dataclasses.replace(KIND, context="contxt").load(rows, "train")


def test_only_two_numbers_per_token_are_the_ends_of_a_span():
    spans = dataclasses.replace(CFG, head="tokens", classes=2)
    KIND.check(spans)
    with pytest.raises(UserError, match="gives 9 numbers per token, but answers need 2"):
        KIND.check(dataclasses.replace(spans, classes=9))
