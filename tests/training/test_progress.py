import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlm.training import progress

METRICS = {
    "loss": 3.25,
    "bits_per_byte": 9.9,
    "tokens_per_second": 6512.3,
    "utilisation": 0.414,
    "learning_rate": 3e-4,
    "skipped": 0.0,
    "unheard_of": 1.0,
}


def clock(seconds=2.0):
    ticks = itertools.count()
    return lambda: next(ticks) * seconds


def run(force_terminal, updates, messages=(), **options):
    out = io.StringIO()
    with progress.Progress(1000, file=out, force_terminal=force_terminal, clock=clock(), **options) as bar:
        for step, metrics in updates:
            bar.update(step, metrics)
        for text in messages:
            bar.message(text)
    return out.getvalue()


def parsed(line):
    return dict(part.split("=", 1) for part in line.split())


def test_plain_lines_can_be_parsed_and_are_aligned():
    text = run(False, [(10, METRICS), (20, {**METRICS, "loss": 12.5}), (1000, METRICS)])
    lines = text.splitlines()
    assert parsed(lines[1]) == {
        "step": "20/1000",
        "loss": "12.5000",
        "tok/s": "6512",
        "utilisation": "0.414",
        "rate": "3.00e-04",
        # 10 steps in 2 seconds, 980 to go.
        "left": "0:03:16",
    }
    assert parsed(lines[0])["left"] == "?"
    assert parsed(lines[2])["left"] == "0:00:00"
    assert len({line.index("tok/s") for line in lines}) == 1
    assert "\x1b" not in text


def test_the_last_evaluation_is_remembered_and_makes_no_line_of_its_own():
    text = run(False, [(10, METRICS), (10, {"validation_bits_per_byte": 1.6, "validation_loss": 1.0}), (20, METRICS)])
    first, second = text.splitlines()
    assert "bits/byte" not in parsed(first)
    assert parsed(second)["bits/byte"] == "1.6000"


def test_skipped_steps_show_once_there_are_any():
    assert "skipped" not in run(False, [(10, METRICS)])
    assert parsed(run(False, [(10, {**METRICS, "skipped": 3.0})]))["skipped"] == "3"


def test_the_pace_is_that_of_the_last_updates():
    slow_then_fast = [(i, METRICS) for i in range(40)] + [(40 + 20 * i, METRICS) for i in range(progress.WINDOW)]
    last = run(False, slow_then_fast).splitlines()[-1]
    # 340 of 1000 steps are done, 20 steps in 2 seconds.
    assert parsed(last)["left"] == "0:01:06"


def screen(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_terminal_shows_bar_numbers_and_messages_above(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    losses = [(i * 100, {**METRICS, "loss": 9.0 - i}) for i in range(1, 6)]
    text = run(True, [*losses, (500, {"validation_bits_per_byte": 1.625})], ["saved [bold]here[/bold]"], unit="ex")
    assert "\x1b[" in text
    last = screen(text[text.index("saved") :])
    for shown in ("saved [bold]here[/bold]", "step 500/1,000", "50%", "left", "4.000 loss █▆▅▃▁", "1.625 bits/byte"):
        assert shown in last
    assert "6.51k ex/s" in last
    assert "41% of peak" in last
    assert max(map(len, last.splitlines())) <= 100


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in run(True, [(10, METRICS)])


def test_other_processes_are_silent(monkeypatch):
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    assert run(True, [(10, METRICS)], ["hello"]) == run(False, [(10, METRICS)], ["hello"]) == ""


def test_close_twice_is_harmless(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    bar = progress.Progress(10, file=io.StringIO(), force_terminal=True)
    bar.close()
    bar.close()


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=200), st.integers(1, 30))
def test_sparkline_is_never_longer_than_asked_and_spans_its_range(values, width):
    line = progress.sparkline(values, width)
    finite = [value for value in values if value == value]
    assert len(line) == min(width, len(finite))
    if len(set(line)) > 1:
        assert {progress.SPARKS[0], progress.SPARKS[-1]} <= set(line)


@pytest.mark.parametrize(("value", "text"), [(873, "873"), (6512, "6.51k"), (12_000_000, "12.0M"), (1.5e11, "150G")])
def test_short_numbers(value, text):
    assert progress._short(value) == text
