"""Prepared data appears whole or not at all."""

import errno
import threading

import pytest

from fastlm.data.directory import create_once, data_directory
from fastlm.errors import UserError


def test_data_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLM_DATA", str(tmp_path))
    assert data_directory() == tmp_path
    assert data_directory(tmp_path / "other") == tmp_path / "other"
    monkeypatch.delenv("FASTLM_DATA")
    assert data_directory().parts[-3:] == (".cache", "fastlm", "data")


@pytest.mark.parametrize("folder", [True, False])
def test_two_at_once_both_succeed(tmp_path, folder):
    barrier = threading.Barrier(2)
    final, results = tmp_path / "deep" / "final", []

    def write(aside):
        barrier.wait(10)
        if folder:
            aside.mkdir()
            (aside / "part").write_text("whole")
        else:
            aside.write_text("whole")
        barrier.wait(10)

    threads = [threading.Thread(target=lambda: results.append(create_once(final, write))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [final, final]
    assert (final / "part" if folder else final).read_text() == "whole"
    assert list(final.parent.iterdir()) == [final]


def test_made_once(tmp_path):
    create_once(tmp_path / "file", lambda aside: aside.write_text("first"))
    create_once(tmp_path / "file", lambda aside: aside.write_text("second"))
    assert (tmp_path / "file").read_text() == "first"


def test_a_failure_leaves_nothing(tmp_path):
    def write(aside):
        aside.mkdir()
        (aside / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        create_once(tmp_path / "final", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_closed_disk_is_an_error_of_one_line(tmp_path, code):
    def write(aside):
        aside.write_text("half")
        raise OSError(code, "no luck")

    with pytest.raises(UserError, match=r"cannot write .*final: no luck; free space or name another folder"):
        create_once(tmp_path / "final", write)
    assert not list(tmp_path.iterdir())
