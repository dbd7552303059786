"""An isolation that lacks one of its promises is refused; without any, nothing runs."""

import os
import shutil

import pytest

from fastlm.errors import UserError
from fastlm.measurement import code_execution
from fastlm.measurement.sandbox import execution, isolation

IMPOSSIBLE = "namespaces._CLONE.update(user=1)"  # no kernel knows such a namespace


@pytest.fixture
def fresh():
    isolation.find.cache_clear()
    yield
    isolation.find.cache_clear()


def weakened(change):
    """The isolation by namespaces, with one of its measures taken away by the Python statement `change`."""

    def command(memory_bytes, cpu_seconds):
        arguments = isolation.through_namespaces(memory_bytes, cpu_seconds)
        boot = arguments.index("-c") + 1
        begin, end = arguments[boot].rsplit("; ", 1)
        arguments[boot] = f"{begin}; import supervisor; {change}; {end}"
        return arguments

    return command


@pytest.mark.parametrize(
    "change, says",
    [
        ("supervisor._limit = lambda *a: None", "number of processes is not limited"),
        ("supervisor.os.environ.clear = lambda: supervisor.os.environ.update(A='b')", "environment is not empty"),
        (
            "real = namespaces._write; namespaces._write = lambda p, t: None if 'max_user' in p else real(p, t)",
            "user namespaces can be made",
        ),
        (
            "real = supervisor.call; "
            "supervisor.call = lambda name, *a: a[0] == supervisor._PR_SET_SECCOMP or real(name, *a)",
            r"not limited \(System V IPC\)",
        ),
        (IMPOSSIBLE, "unshare: Invalid argument"),
    ],
)
def test_probe_refuses_what_is_missing(change, says):
    with pytest.raises(execution.IsolationError, match=says):
        isolation.probe(weakened(change))


def test_probe_accepts_what_is_whole():
    isolation.probe(weakened("pass"))


def test_probe_refuses_a_writable_root():
    # Root's programs are nobody and could not write there anyway, so the folder is opened to all.
    change = "namespaces._set_attributes = lambda path, *a: path == '/' and supervisor.os.chmod('/', 0o777)"
    with pytest.raises(execution.IsolationError, match="can be written to"):
        isolation.probe(weakened(change))


def test_nothing_runs_without_isolation(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    broken = weakened(IMPOSSIBLE)
    monkeypatch.setattr(isolation, "ISOLATIONS", {"bubblewrap": isolation.through_bubblewrap, "namespaces": broken})
    executed = []
    real = isolation.execute
    monkeypatch.setattr(isolation, "execute", lambda *a: executed.append("probe") or real(*a))
    monkeypatch.setattr(code_execution, "execute", lambda *a: executed.append("program"))
    with pytest.raises(UserError) as caught:
        code_execution.run_tests(["x = 1"])
    assert executed == ["probe"]
    message = str(caught.value)
    assert "bwrap is not on PATH" in message and "unshare" in message and "install bubblewrap" in message
    assert "\n" not in message


def test_other_systems_are_refused(fresh, monkeypatch):
    monkeypatch.setattr(isolation.sys, "platform", "darwin")
    with pytest.raises(UserError, match="Linux only"):
        isolation.find()


def test_an_isolation_that_breaks_later_is_no_failure_of_the_program(fresh, monkeypatch):
    monkeypatch.setattr(isolation, "find", lambda: weakened(IMPOSSIBLE))
    with pytest.raises(UserError, match="could not be isolated"):
        code_execution.run_tests(["x = 1"])
    monkeypatch.setattr(isolation, "find", lambda: weakened("supervisor._drop_privileges = lambda: 1 / 0"))
    with pytest.raises(UserError, match="could not be isolated"):
        code_execution.run_tests(["x = 1"])


def test_shown_folders_cannot_be_written_even_if_all_may(fresh, monkeypatch, tmp_path):
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "text").write_text("kept")
    for path in (shown, shown / "text"):
        path.chmod(0o777)
    paths = isolation.visible_paths()
    monkeypatch.setattr(isolation, "visible_paths", lambda: [*paths, str(shown)])
    outcomes = code_execution.run_tests(
        [f"assert open('{shown}/text').read() == 'kept'", f"open('{shown}/text', 'w')", f"open('{shown}/new', 'w')"],
        timeout_seconds=10.0,
    )
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "failed"]
    assert all("Read-only file system" in outcome.message for outcome in outcomes[1:])
    assert (shown / "text").read_text() == "kept" and not (shown / "new").exists()


@pytest.mark.parametrize("umask", [0o077, 0])
def test_any_umask_will_do(umask):
    before = os.umask(umask)
    try:
        isolation.probe(isolation.through_namespaces)
    finally:
        os.umask(before)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.skipif(os.geteuid() == 0, reason="bubblewrap does not limit root's processes")
def test_bubblewrap_keeps_the_promises():
    isolation.probe(isolation.through_bubblewrap)
