"""Windows over long contexts: they cover everything, overlap, and know the characters behind their tokens."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data import examples
from fastlm.data.encoded import log_once
from fastlm.data.tokenizers import byte_level
from fastlm.errors import UserError
from fastlm.tasks.context_windows import FIRST, WHERE, ContextWindows, Windowing

TOKENIZER = byte_level.ByteTokenizer()
WINDOWING = Windowing(TOKENIZER, 24, 4)
TEXTS = st.text("ab é数🎉", max_size=60)


@given(question=TEXTS, context=TEXTS)
def test_windows_cover_the_context_and_overlap(question, context):
    ids = TOKENIZER.encode(context).tolist()
    firsts = WINDOWING.firsts(question, context).tolist()
    reached = 0
    for number, first in enumerate(firsts):
        window = WINDOWING.window(question, context, first)
        assert len(window.tokens) <= 24 and len(window.tokens) == len(window.token_types)
        part = window.tokens[window.context_first : window.context_stop].tolist()
        assert part == ids[first : first + len(part)]
        assert number == 0 or first <= reached - 4
        reached = first + len(part)
        asked = TOKENIZER.encode(question)[:12].tolist()
        assert window.tokens.tolist() == [TOKENIZER.bos, *asked, TOKENIZER.eos, *part, TOKENIZER.eos]
        assert window.token_types.tolist() == [0] * (len(asked) + 2) + [1] * (len(part) + 1)
    assert firsts[0] == 0 and reached == len(ids)
    # All windows of a cut context are full, the last one too.
    assert len(firsts) == 1 or all(len(WINDOWING.window(question, context, f).tokens) == 24 for f in firsts)


@given(question=TEXTS, context=TEXTS.filter(bool), data=st.data())
def test_an_answer_comes_back_as_its_characters_from_every_window_that_holds_it(question, context, data):
    start = data.draw(st.integers(0, len(context) - 1))
    stop = data.draw(st.integers(start + 1, min(len(context), start + 2)))
    holding = 0
    before, size = len(context[:start].encode()), len(context[start:stop].encode())
    for first in WINDOWING.firsts(question, context):
        window = WINDOWING.window(question, context, first)
        places = window.places(start, stop)
        whole = first <= before and before + size <= first + window.context_stop - window.context_first
        assert (places != (0, 0)) == whole
        if whole:
            holding += 1
            assert window.context_first <= places[0] <= places[1] < window.context_stop
            assert window.characters(*places) == slice(start, stop)
    assert holding or size > 4  # what is no longer than the overlap lies whole in some window


def test_rows_become_windows_that_know_their_row(tmp_path):
    rows = [{"split": "train", "q": "?", "c": "x" * size} for size in (3, 50, 0)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = examples.load(f"jsonl:{tmp_path}/rows.jsonl", "train", data_dir=tmp_path)
    made = ContextWindows(base, WINDOWING, question="q", context="c", data_dir=tmp_path)
    # 24 tokens less the question's 1 and three special ones leave 20, of which 16 are new in each window.
    assert [row[FIRST] for row in made] == [0, 0, 16, 30, 0]
    assert [row[WHERE].split(" of ")[0] for row in made] == ["row 0", "row 1", "row 1", "row 1", "row 2"]
    assert [len(row["c"]) for row in made.get([4, 1])] == [0, 50]
    assert set(made.fields) == {*base.fields, FIRST, WHERE}
    wider = ContextWindows(base, Windowing(TOKENIZER, 24, 0), question="q", context="c", data_dir=tmp_path)
    assert wider.fingerprint != made.fingerprint and len(wider) == 5 and np.all(np.diff(wider._records) >= 0)


def test_how_many_questions_were_cut_is_said_by_every_run(tmp_path, caplog):
    rows = [{"split": "train", "q": "?" * size, "c": "x" * 30} for size in (12, 13, 50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = examples.load(f"jsonl:{tmp_path}/rows.jsonl", "train", data_dir=tmp_path)
    for _ in range(2):
        log_once.cache_clear()
        ContextWindows(base, WINDOWING, question="q", context="c", data_dir=tmp_path)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    cut = "2 of 3 rows are cut: questions at their end, to half of config.data.length=24 tokens"
    assert said == [f"{base.name}: {cut}"] * 2


def test_an_overlap_that_leaves_nothing_new_is_refused():
    with pytest.raises(UserError, match=r"config\.task\.stride: windows share 9 tokens, but .* leaves only 9"):
        Windowing(TOKENIZER, 24, 9)
    assert Windowing(TOKENIZER, 24, 8).firsts("?" * 12, "x" * 11).tolist() == [0, 1, 2]
