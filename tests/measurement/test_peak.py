import itertools
import json

import jax.numpy as jnp
import pytest

from fastlm.measurement import peak


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    measured = itertools.count(1)
    monkeypatch.setattr(peak, "measure", lambda dtype: 1e9 * next(measured))
    return tmp_path / "cache"


def test_is_measured_once_for_each_type(cache):
    assert peak.matmul_peak(jnp.bfloat16) == peak.matmul_peak("bfloat16") == 1e9
    assert peak.matmul_peak("float32") == 2e9
    assert len(list(cache.iterdir())) == 2
    for path in cache.iterdir():
        path.unlink()
    assert peak.matmul_peak("bfloat16") == 3e9


@pytest.mark.parametrize("content", ["", "[]", '{"flops_per_second": -1}', '{"flops_per_second": null}', "\x00"])
def test_a_damaged_cache_is_measured_anew(cache, content):
    peak.matmul_peak("float32")
    (path,) = cache.iterdir()
    path.write_text(content)
    assert peak.matmul_peak("float32") == 2e9
    assert json.loads(path.read_text()) == {"flops_per_second": 2e9}


def test_another_machine_or_version_has_its_own_value(cache, monkeypatch):
    peak.matmul_peak("float32")
    monkeypatch.setattr(peak, "_cores", lambda: 12345)
    assert peak.matmul_peak("float32") == 2e9
    monkeypatch.setattr(peak.jax, "__version__", "0.0.1")
    assert peak.matmul_peak("float32") == 3e9


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch, cache):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "file"))
    assert peak.matmul_peak("float32") == 1e9


def test_cpu_devices_of_a_host_count_once(cache):
    assert peak.job_peak("float32") == 1e9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measures_work_over_the_best_time(dtype):
    # Each look at the clock takes half a second, so a repetition does.
    ticks = itertools.count()
    rate = peak.measure(dtype, ((8, 16, 4), (16, 16, 4)), seconds=1.0, clock=lambda: 0.5 * next(ticks))
    assert rate == 2 * 16 * 16 * 4 / 0.5


def test_utilisation():
    assert peak.utilisation(2e9, 8e9) == 0.25
