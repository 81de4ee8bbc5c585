"""Run directories, locks, and the deaths of other processes, with real ones."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.entry import at_last, run_process
from common.errors import ConfigError, InternalError, PeerError, UsageError
from common.process import (
    LEASH_VARIABLE,
    Leash,
    Lock,
    Terminated,
    TerminatedNow,
    clear_run_directory,
    raise_on_termination,
    remove_run_directory,
    run_directory,
    watch,
)

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 10.0
IS_ROOT = os.getuid() == 0


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python code that says "ready" and then waits; ends what is left of it."""
    processes: list[subprocess.Popen[str]] = []

    def make(code: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()",
             *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield make
    for process in processes:
        process.kill()
        process.communicate()


HOLD = """
from pathlib import Path
from common.process import Lock
lock = Lock(Path(sys.argv[1]), "feeder")
lock.acquire()
"""


# The run directory -----------------------------------------------------------------------------------


def test_the_run_directory_is_private(runtime: Path) -> None:
    old = os.umask(0)
    try:
        directory = run_directory("default")
    finally:
        os.umask(old)
    assert directory == runtime / "weight-feeder" / "default"
    for path in (directory, directory.parent):
        assert path.stat().st_mode & 0o777 == 0o700
    assert run_directory("default") == directory  # it may be there
    assert run_directory("other") != directory


@pytest.mark.parametrize("unusable", ["", "/nowhere/at/all", "file"])
def test_without_a_runtime_directory_it_is_in_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unusable: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", unusable and str(tmp_path / unusable))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_directory("x") == tmp_path / f"weight-feeder-{os.getuid()}" / "x"


@pytest.mark.parametrize("name", ["a", "A-1._b", "7", "x" * 64])
def test_usable_names(runtime: Path, name: str) -> None:
    assert run_directory(name).name == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "-a", ".a", "_a", "a b", "a\n", "ä", "x" * 65, "a\0"]
)
def test_other_names_are_refused(runtime: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is not usable: give up to 64 letters"):
        run_directory(name)
    assert list(runtime.iterdir()) == []


def open_to_group(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True)
    path.chmod(0o750)


def open_to_all(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True)
    path.chmod(0o701)


def foreign(path: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root can give a directory away")
    path.mkdir(mode=0o700, parents=True)
    os.chown(path, 12345, 12345)


def a_link(path: Path) -> None:
    target = path.parent.parent / "target"
    target.mkdir(mode=0o700)
    path.symlink_to(target)


def a_dangling_link(path: Path) -> None:
    path.symlink_to("gone")


def a_file(path: Path) -> None:
    path.touch(mode=0o600)


@pytest.mark.parametrize(
    "prepare", [open_to_group, open_to_all, foreign, a_link, a_dangling_link, a_file]
)
@pytest.mark.parametrize("which", ["weight-feeder", "weight-feeder/default"])
def test_a_directory_that_is_not_private_is_refused(
    runtime: Path, which: str, prepare: Callable[[Path], None]
) -> None:
    path = runtime / which
    if path.parent != runtime:
        path.parent.mkdir(mode=0o700)
    prepare(path)
    with pytest.raises(ConfigError, match=f"run directory {path} is not private to this user"):
        run_directory("default")
    if prepare is a_link:
        assert list(path.resolve().iterdir()) == []


def test_the_last_one_out_removes_the_directories(runtime: Path) -> None:
    first, second = run_directory("first"), run_directory("second")
    (first / "feeder.lock").touch()
    remove_run_directory(first)
    assert first.exists()
    (first / "feeder.lock").unlink()
    remove_run_directory(first)
    assert not first.exists()
    assert second.exists()
    remove_run_directory(second)
    assert list(runtime.iterdir()) == []
    remove_run_directory(second)  # gone already


def test_what_killed_processes_left_is_cleared(
    runtime: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    directory = run_directory("default")
    lock = directory / "feeder.lock"
    process = start(HOLD, str(lock))
    (directory / "feeder.sock").touch()
    (directory / "engine.lock").write_text("4194000")
    clear_run_directory(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["feeder.lock", "feeder.sock"]
    assert Lock.holder(lock) == process.pid
    process.kill()
    process.wait()
    clear_run_directory(directory)
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("public", ["the directory", "the one above"])
def test_nothing_is_removed_where_others_may_write(runtime: Path, public: str) -> None:
    directory = run_directory("default")
    (directory if public == "the directory" else directory.parent).chmod(0o755)
    for name in ("feeder.lock", "feeder.sock"):
        (directory / name).touch()
    clear_run_directory(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["feeder.lock", "feeder.sock"]
    for name in ("feeder.lock", "feeder.sock"):
        (directory / name).unlink()
    clear_run_directory(directory)
    remove_run_directory(directory)
    assert directory.exists() == (public == "the directory")
    assert directory.parent.exists()


def test_a_link_to_another_place_is_not_followed(runtime: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "feeder.lock").touch()
    (elsewhere / "feeder.sock").touch()
    directory = run_directory("default")
    directory.rmdir()
    directory.symlink_to(elsewhere)
    clear_run_directory(directory)
    assert len(list(elsewhere.iterdir())) == 2


# Locks -----------------------------------------------------------------------------------------------


def test_a_second_holder_is_refused_naming_the_first(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    path = tmp_path / "default" / "feeder.lock"
    path.parent.mkdir()
    process = start(HOLD, str(path))
    assert Lock.holder(path) == process.pid
    lock = Lock(path, "feeder")
    expected = f"feeder 'default' runs already, pid {process.pid}: end that one, or choose another"
    with pytest.raises(UsageError, match=expected):
        lock.acquire()
    lock.release()  # what was not acquired is not released
    assert Lock.holder(path) == process.pid
    process.communicate("")
    assert Lock.holder(path) is None
    lock.acquire()
    assert Lock.holder(path) == os.getpid()
    lock.release()
    assert not path.exists()


def test_what_a_killed_holder_left_is_used_again(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    path = tmp_path / "feeder.lock"
    process = start(HOLD, str(path))
    process.kill()
    process.wait()
    assert path.read_text() == str(process.pid)
    assert Lock.holder(path) is None  # the number alone says nothing
    lock = Lock(path, "feeder")
    lock.acquire()
    assert path.read_text() == str(os.getpid())
    assert Lock.holder(path) == os.getpid()
    lock.release()


def test_a_long_pid_of_a_dead_one_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "feeder.lock"
    path.write_text("9" * 30)
    lock = Lock(path, "feeder")
    lock.acquire()
    assert path.read_text() == str(os.getpid())
    lock.release()


def test_nobody_holds_what_is_not_there(tmp_path: Path) -> None:
    assert Lock.holder(tmp_path / "feeder.lock") is None
    assert Lock.holder(tmp_path / "no" / "feeder.lock") is None
    (tmp_path / "feeder.lock").write_text("junk")
    assert Lock.holder(tmp_path / "feeder.lock") is None
    assert list(tmp_path.iterdir()) == [tmp_path / "feeder.lock"]  # looking leaves nothing


def test_a_lock_is_not_a_way_into_other_files(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "feeder.lock").symlink_to("precious")
    with pytest.raises(OSError):
        Lock(tmp_path / "feeder.lock", "feeder").acquire()
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_lock_is_not_inherited_by_children(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "feeder.lock", "feeder")
    lock.acquire()
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        lock.release()
        again = Lock(tmp_path / "feeder.lock", "feeder")
        again.acquire()
        again.release()
    finally:
        child.kill()
        child.wait()


COME_AND_GO = """
from common.process import Lock, remove_run_directory, run_directory
sys.stdin.readline()
for _ in range(300):
    directory = run_directory("default")
    lock = Lock(directory / f"{sys.argv[1]}.lock", sys.argv[1])
    lock.acquire()
    assert Lock.holder(directory / f"{sys.argv[1]}.lock")
    lock.release()
    remove_run_directory(directory)
"""


def test_those_who_come_and_those_who_go_are_in_nobodys_way(runtime: Path) -> None:
    """One makes the directory, another removes it since it is empty, the first makes its lock."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"import sys\n{COME_AND_GO}", f"role{number}"],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for number in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert list(runtime.iterdir()) == []


def test_a_directory_that_was_removed_meanwhile_is_made_again(runtime: Path) -> None:
    directory = run_directory("default")
    remove_run_directory(directory)
    lock = Lock(directory / "feeder.lock", "feeder")
    lock.acquire()
    assert run_directory("default") == directory  # it is as private as before
    lock.release()


# Deaths ----------------------------------------------------------------------------------------------


def test_a_death_is_seen_and_a_stop_is_not(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("")
    fd = watch(process.pid)
    try:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # it has stopped
        assert select.select([fd], [], [], 0.05)[0] == []
        process.kill()
        assert select.select([fd], [], [], PATIENCE_S)[0] == [fd]
    finally:
        os.close(fd)


def test_one_who_is_gone_cannot_be_watched(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("")
    process.communicate("")
    with pytest.raises(PeerError, match=f"process {process.pid} is gone: No such process"):
        watch(process.pid)


@pytest.mark.parametrize("pid", [0, -1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 70])
def test_a_number_that_is_no_process_cannot_be_watched(pid: int) -> None:
    with pytest.raises(PeerError, match=f"process {pid} "):
        watch(pid)


# The leash, and how a process ends -------------------------------------------------------------------


@pytest.fixture
def leash(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The launcher's end of a leash whose other end is this process's."""
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)  # as it comes from a launcher
    monkeypatch.setenv(LEASH_VARIABLE, str(theirs.detach()))
    ours.settimeout(PATIENCE_S)
    with ours:
        yield ours


def test_a_leash_tells_both_ways(leash: socket.socket) -> None:
    held = Leash()
    assert LEASH_VARIABLE not in os.environ  # children of this process have none
    assert held.fd is not None and not os.get_inheritable(held.fd)
    assert held.report('it "failed"\nbadly')
    line = leash.recv(4096)
    assert line.count(b"\n") == 1
    assert json.loads(line) == {"error": 'it "failed"\nbadly'}
    assert select.select([held.fd], [], [], 0)[0] == []
    leash.close()
    assert select.select([held.fd], [], [], PATIENCE_S)[0] == [held.fd]
    assert not held.report("to nobody")


@pytest.fixture
def termination() -> Iterator[None]:
    former = signal.getsignal(signal.SIGTERM)
    raise_on_termination()
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.mark.usefixtures("termination")
def test_the_launchers_end_reaches_a_main_thread_that_is_busy(leash: socket.socket) -> None:
    held = Leash()
    with pytest.raises(TerminatedNow), held.guarding():
        leash.close()
        threading.Event().wait(PATIENCE_S)


@pytest.mark.usefixtures("termination")
def test_who_listens_again_is_left_alone(leash: socket.socket) -> None:
    held, before = Leash(), threading.active_count()
    with held.guarding():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    leash.close()
    threading.Event().wait(0.05)  # and no signal comes


@pytest.mark.parametrize("value", [None, "", "x", "-1", "99999"])
def test_without_a_launcher_there_is_no_leash(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(LEASH_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(LEASH_VARIABLE, value)
    held = Leash()
    assert held.fd is None
    assert not held.report("to nobody")
    with held.guarding():
        pass


def failing(error: BaseException) -> Callable[[Leash], None]:
    def work(_: Leash) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no such\nflag"), 2, "no such flag"),
        (PeerError("gone"), 1, "gone"),
        (InternalError("a defect"), 1, "a defect"),
        (ValueError("two\nlines"), 1, "ValueError: two lines"),
        (MemoryError(), 1, "MemoryError: "),
        (KeyboardInterrupt(), 130, None),
        (Terminated(signal.SIGTERM), 143, None),
        (Terminated(signal.SIGINT), 130, None),
    ],
)
def test_how_a_process_ends(
    leash: socket.socket,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str | None,
) -> None:
    for launched in (True, False):
        assert run_process("feeder", False, failing(error)) == code
        stderr = capsys.readouterr().err
        if line is None:
            assert stderr == ""
        elif launched:
            assert json.loads(leash.recv(4096)) == {"error": line.rstrip()}
            assert "error: " not in stderr
        else:
            assert stderr.splitlines()[-1] == f"error: {line}".rstrip()
        defect = isinstance(error, InternalError | ValueError | MemoryError)
        assert ("Traceback" in stderr) == defect


def test_a_process_that_does_its_work_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int | None] = []
    assert run_process("feeder", False, lambda leash: done.append(leash.fd)) == 0
    assert done == [None]
    assert capsys.readouterr().err == ""


def test_what_fails_at_the_end_does_not_hide_the_first_cause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended: list[str] = []

    def end() -> None:
        ended.append("tried")
        raise RuntimeError("the device is\nlost")

    def work(fails: bool) -> Callable[[Leash], None]:
        def run(_: Leash) -> None:
            with ExitStack() as stack:
                stack.callback(ended.append, "after")
                stack.push(at_last(end))
                if fails:
                    raise UsageError("the first cause")

        return run

    assert run_process("engine", False, work(fails=True)) == 2
    stderr = capsys.readouterr().err.splitlines()
    assert stderr == ["engine: and while ending: the device is lost", "error: the first cause"]
    assert run_process("engine", False, work(fails=False)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: RuntimeError: the device is lost"
    assert ended == ["tried", "after"] * 2
