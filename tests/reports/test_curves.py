"""Curves are drawn from what a run logged, and what is missing is named."""

import json

import pytest
from PIL import Image

from fastlm.errors import UserError
from fastlm.reports import curves


@pytest.fixture
def workdir(tmp_path):
    rows = [{"step": s, "time": 0.0, "train/bits_per_byte": 4.0 / s} for s in range(1, 6)]
    rows += [{"step": 5, "time": 0.0, "validation/bits_per_byte": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_reads_steps_and_values(workdir):
    assert curves.read(workdir, "train/bits_per_byte") == ([1, 2, 3, 4, 5], [4.0, 2.0, 4 / 3, 1.0, 0.8])


def test_draws_a_picture_with_something_on_it(workdir):
    curves.draw([str(workdir), str(workdir)], "bits_per_byte", workdir / "c.png")
    with Image.open(workdir / "c.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_missing_metrics_are_named(workdir, tmp_path):
    with pytest.raises(
        UserError, match=r"no metric 'train/speed'; it has train/bits_per_byte, validation/bits_per_byte"
    ):
        curves.read(workdir, "train/speed")
    with pytest.raises(UserError, match="no such file"):
        curves.read(tmp_path / "nowhere", "train/loss")
