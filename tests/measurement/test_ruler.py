"""The ruler's arithmetic, on loads that take as long as the test says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastlm.measurement import ruler, runtimes
from fastlm.measurement.ruler import Load, Measured
from fastlm.models import Model, ModelConfig

READ, WRITE = Load(2, 10), Load(2, 10, 16)
SIZES = ruler.Sizes(parameters=10, stored=40, gzipped=30, files=50, flops=2e6, length=10)


def measured(name, seconds, stored=40, **quality):
    sizes = ruler.dataclasses.replace(SIZES, stored=stored)
    pieces = {str(READ): [[s] for s in seconds], str(WRITE): [[s, 3 * s] for s in seconds]}
    return Measured(name, sizes, pieces, 100.0, quality)


def test_sizes_of_weights():
    params = {"a": jnp.zeros((64, 64), jnp.bfloat16), "b": {"c": jax.random.normal(jax.random.key(0), (1000,))}}
    found = ruler.sizes(params, 1e6, 10, files=7)
    assert (found.parameters, found.stored, found.files) == (5096, 2 * 64 * 64 + 4000, 7)
    assert 3000 < found.gzipped < 4200  # the zeros are gone, the noise is not
    assert ruler.gzipped_bytes([np.float32(1.0), np.zeros((0, 3), np.int8)]) > 0


def test_bytes_of_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"12")
    assert ruler.folder_bytes(tmp_path) == 5


def test_models_take_turns_behind_a_warm_up():
    calls = []
    run = lambda name: lambda load: calls.append((name, load.count)) or [len(calls)]
    seconds = ruler.take_turns({"old": run("old"), "new": run("new")}, [READ, WRITE], 2)
    turn = lambda count: [("old", count), ("new", count)]
    assert calls == turn(0) * 3 + turn(16) * 3
    assert seconds["old"] == {str(READ): [[3], [5]], str(WRITE): [[9], [11]]}


def test_rates_and_latencies():
    model = measured("m", [1.0, 2.0])
    assert model.rates(READ) == [20.0, 10.0] and model.rates(WRITE) == [8.0, 4.0]
    pieces = np.array([1, 3, 2, 6]) / runtimes.PIECE
    assert model.latencies(WRITE)[50] == pytest.approx(np.median(pieces))
    assert model.latencies(WRITE)[99] == pytest.approx(np.percentile(pieces, 99))


@pytest.mark.parametrize(
    ("seconds", "word"),
    [
        ([0.5, 0.6, 0.5, 0.4], "faster at reading"),
        ([2.0, 2.1, 1.9, 2.0], "NOT faster (slower) at reading"),
        ([1.1, 0.9, 1.2, 0.8], "NOT faster (as fast, within the spread) at reading"),
    ],
)
def test_verdicts_on_speed_go_by_the_quartiles(seconds, word):
    base = measured("base", [1.0] * 4)
    lines = ruler.verdicts(measured("m", seconds), base, [READ])
    assert lines[1].startswith(word)


def test_verdicts_on_size_and_quality():
    base = measured("base", [1.0, 1.0], accuracy=0.9, accuracy_error=0.03, loss=1.0)
    same = ruler.verdicts(measured("m", [1.0, 1.0], accuracy=0.88, accuracy_error=0.04, loss=2.0), base, [])
    assert same == ["NOT smaller: 1.00x the bytes", "accuracy: 0.88, -0.02 to the baseline's (error of both 0.05)"]
    assert ruler.verdicts(measured("m", [1.0], stored=10), base, []) == ["smaller: 0.25x the bytes"]


def test_table():
    base = measured("base", [1.0, 1.0], accuracy=0.9, accuracy_error=0.03)
    lines = ruler.table([base, measured("half", [0.5, 0.5], stored=20)], [READ, WRITE]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {len(row) for row in cells} == {4} and cells[0] == ["", "base", "half", "half / base"]
    rows = {row[0]: row[1:] for row in cells[2:]}
    assert rows["bytes as stored"] == ["40", "20", "0.500x"]
    assert rows["reading, 2 rows of 10"] == ["20 tok/s", "40 tok/s", "2.00x (2.00-2.00)"]
    assert rows["writing, 2 rows"] == ["8 tok/s", "16 tok/s", "2.00x (2.00-2.00)"]
    assert rows["accuracy"][:2] == ["0.9 ± 0.03", "-"]
    assert len(ruler.table([base], [READ]).splitlines()[0].split("|")) == 4


@pytest.mark.parametrize(
    ("options", "writes"),
    [
        ({"family": "decoder"}, True),
        ({"family": "encoder_decoder", "encoder_layers": 1}, True),
        ({"family": "encoder", "head": "sequence", "classes": 3}, False),
        ({"family": "encoder", "head": "none"}, False),
    ],
)
def test_every_family_can_be_timed(options, writes):
    cfg = ModelConfig(vocab_size=40, layers=1, width=16, heads=2, max_length=64, **options)
    model = Model(cfg)
    runtime = runtimes.Jitted(model, model.init(jax.random.key(0)), 1 if cfg.encoder_layers else None)
    assert runtime.writes() == writes
    assert runtime.read(2, 8) > 0
    if writes:
        seconds = runtime.write(2, 8, 2 * runtimes.PIECE)
        assert len(seconds) == 2 and min(seconds) > 0
