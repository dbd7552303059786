"""What the scaling benchmark makes of its measurements."""

import math

from experiments.benchmarks import attention_scaling as scaling


def rows(variant, seconds, what="training"):
    return [
        {"variant": variant, "length": length, "pass": what, "seconds": value, "bytes": 2**20, "turns": [value]}
        for length, value in seconds.items()
    ]


def test_exponents_are_slopes_over_long_rows():
    lengths = (256, 1024, 2048, 4096)
    quadratic = {length: 1e-9 * length**2 + (5.0 if length < 1024 else 0) for length in lengths}
    assert math.isclose(scaling.exponent(quadratic), 2.0)
    assert math.isnan(scaling.exponent({256: 1.0, 1024: 2.0}))


def test_a_crossover_is_where_a_kind_becomes_faster_for_good():
    full = {256: 1.0, 512: 2.0, 1024: 4.0, 2048: 8.0}
    assert scaling.crossover({256: 0.5, 512: 3.0, 1024: 3.0, 2048: 3.0}, full) == 1024
    assert scaling.crossover({256: 0.5, 512: 0.5, 1024: 0.5, 2048: 9.0}, full) is None


def test_the_table_has_a_line_per_variant_with_its_ratios(tmp_path):
    measured = rows("full", {1024: 0.010, 4096: 0.160}) + rows(scaling.MATRIX, {1024: 0.020, 4096: 0.320})
    measured += (
        rows(scaling.PLAIN, {1024: 0.040, 4096: 0.640})
        + rows("linear", {1024: 0.008, 4096: 0.032})
        + rows("linear", {1024: 1e-4, 4096: 1e-4}, "decoding")
    )
    lines = scaling.table(measured).splitlines()
    assert len(lines) == 2 + 4
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == ["linear", "-", "32.0", "20.0", "10.0", "5.0", "1", "1.00", "1,024", "100", "100"]
    scaling.draw(measured, str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_what_is_not_measured():
    assert scaling.measured(scaling.MATRIX, 4096, "training")
    assert not scaling.measured(scaling.MATRIX, 8192, "training")
    assert not scaling.measured("torch full", 256, "decoding")
    assert scaling.measured("linear", 16384, "decoding")
