"""Real processes for tests: a private room to start them in, and what they may not leave behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.process import Lock
from common.settings import PREFIX
from tests.forked import Forked, begin, forkable

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so begins what a shell starts with &
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or no child would see a Ctrl-C

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "model"
SHARED = Path("/dev/shm")
ROOM_PREFIX = "wf-"

#: How long something may take before a test calls it hung. Nothing is measured against it.
PATIENCE_S = 240.0


@dataclass(frozen=True)
class Ended:
    """A process that has ended. ``code`` is negative if a signal killed it."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.rstrip("\n").rpartition("\n")[2]


class Process:
    """A process of a room. Its output goes to files, so that it never waits for a reader."""

    def __init__(self, room: Room, command: list[str], number: int) -> None:
        self._out, self._err = room.path / f"{number}.out", room.path / f"{number}.err"
        self.popen: subprocess.Popen[bytes] | Forked
        with self._out.open("wb") as out, self._err.open("wb") as err:
            if forkable(command):
                self.popen = Forked(command, ROOT, room.environment, out, err)
            else:
                self.popen = subprocess.Popen(
                    command, cwd=ROOT, env=room.environment, stdin=subprocess.DEVNULL,
                    stdout=out, stderr=err, process_group=0,
                )  # fmt: skip
        self.pid = self.popen.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def until(self, true: Callable[[], object], what: str) -> None:
        """Wait for a condition, for as long as the process lives."""
        until(
            lambda: true() or self.popen.poll() is not None,
            lambda: f"{what}; so far:\n{self.out}\n{self.err}",
        )
        assert true(), f"ended with {self.popen.returncode} before: {what}\n{self.out}\n{self.err}"

    def until_said(self, text: str) -> None:
        """Wait until the process has written ``text``."""
        self.until(lambda: text in self.err or text in self.out, f"says {text!r}")

    def signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        self.popen.send_signal(number)

    def ctrl_c(self) -> None:
        """SIGINT to the process group, as a terminal sends it."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self) -> Ended:
        """Wait until the process has ended by itself."""
        try:
            self.popen.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs; so far:\n{self.out}\n{self.err}") from None
        return Ended(self.popen.returncode, self.out, self.err)

    def stop(self) -> Ended:
        """End it as a user would."""
        self.popen.terminate()
        return self.wait()

    def child(self, name: str) -> int:
        """The pid of the child that runs ``-m NAME``, as soon as there is one."""
        found: list[int] = []

        def look() -> bool:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            for pid in map(int, children):
                if f"\0-m\0{name}\0".encode() in _read(f"/proc/{pid}/cmdline"):
                    found.append(pid)
            return bool(found)

        self.until(look, f"starts {name}")
        return found[0]


class Room:
    """A run directory and a cache of their own, and all that runs with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: For feeders that keep their store: in /dev/shm all rooms of a machine meet.
        self.name = path.name
        self.runtime, self.cache = path / "run", path / "cache"
        self.runtime.mkdir(mode=0o700)
        self.cache.mkdir()
        inherited = {  # without settings of whoever runs the tests
            name: text for name, text in os.environ.items() if not name.startswith(PREFIX)
        }
        self._mark = f"XDG_RUNTIME_DIR={self.runtime}"
        self.environment = inherited | {
            "XDG_RUNTIME_DIR": str(self.runtime),
            "XDG_CACHE_HOME": str(self.cache),
            "XDG_CONFIG_HOME": str(path / "config"),
            "XDG_STATE_HOME": str(path / "state"),
        }
        self._started: list[Process] = []
        self._shared_before = self.shared_entries()

    def directory(self, name: str = "default") -> Path:
        """The run directory of the processes called ``name``; not made here."""
        return self.runtime / "weight-feeder" / name

    def start(self, *command: object) -> Process:
        """Start ``python COMMAND``."""
        process = Process(self, [sys.executable, *map(str, command)], len(self._started))
        self._started.append(process)
        return process

    def launch(self, *flags: object) -> Process:
        return self.start("launch.py", *flags)

    def engine(self, *flags: object) -> Process:
        return self.start("-m", "engine", *flags)

    def feeder(self, *flags: object, name: str = "default", module: str = "feeder") -> Process:
        """Start ``python -m MODULE`` and wait until engines can reach it."""
        return self.feeders({name: flags}, module)[name]

    def feeders(
        self, flags: Mapping[str, Sequence[object]], module: str = "feeder"
    ) -> dict[str, Process]:
        """Several at once, by name, which takes less time than one after the other."""
        started = {n: self.start("-m", module, f"--name={n}", *flags[n]) for n in flags}
        for name, process in started.items():
            process.until((self.directory(name) / "feeder.sock").exists, "listens")
        return started

    def processes(self) -> list[int]:
        """The pids of all living processes of this room, whoever started them."""
        pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        # Those that were forked have another's environment in /proc, but groups of their own.
        groups = {process.pid for process in self._started}
        return [
            pid for pid in pids
            if self._mark.encode() in _environment(pid) or _group(pid) in groups
        ]  # fmt: skip

    def leftovers(self) -> list[str]:
        """Everything that this room's processes have left, now."""
        found = [f"process {pid}: {_read(f'/proc/{pid}/cmdline')!r}" for pid in self.processes()]
        for directory, _, names in os.walk(self.runtime):  # which others may be clearing
            if Path(directory) != self.runtime:
                found.append(directory)
            found += [f"{directory}/{name}" for name in names]
        found += [
            str(SHARED / name) for name in sorted(self.shared_entries() - self._shared_before)
        ]
        return found

    def shared_entries(self) -> set[str]:
        """This project's entries in /dev/shm, but for those that bear the name of another room."""
        found = set()
        for path in SHARED.glob("weight-feeder*"):
            name = path.name.split(",")[2:3]
            if name == [self.name] or not (name and name[0].startswith(ROOM_PREFIX)):
                found.add(path.name)
        return found

    def settle(self) -> None:
        """Wait until nothing is left: what lost its launcher needs a moment to notice."""
        until(lambda: not self.leftovers(), lambda: f"left behind: {self.leftovers()}")

    def close(self) -> None:
        """Stop what still runs, then check that nothing is left."""
        running = [process for process in self._started if process.popen.poll() is None]
        for process in running:
            process.popen.terminate()
        for process in running:
            process.wait()
        self.settle()

    def clear(self) -> None:
        """Remove whatever there is, so that a test that failed disturbs no other."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.popen.wait()
        for name in self.shared_entries() - self._shared_before:
            (SHARED / name).unlink(missing_ok=True)


@contextmanager
def room() -> Iterator[Room]:
    """A new room, in a path short enough for a socket's."""
    begin()
    path = Path(tempfile.mkdtemp(prefix=ROOM_PREFIX))
    place = Room(path)
    try:
        yield place
        place.close()
    finally:
        place.clear()
        shutil.rmtree(path)


def until(true: Callable[[], object], what: Callable[[], str]) -> None:
    """Wait for a condition; fail, saying ``what``, if it does not come about."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > end:
            raise AssertionError(what())
        time.sleep(0.01)


def lock_holder(room: Room, role: str, name: str = "default") -> int | None:
    """The pid of the living feeder or engine called ``name``."""
    return Lock.holder(room.directory(name) / f"{role}.lock")


def assert_refused(ended: Ended, message: str, *, code: int | None = None) -> None:
    """One line that says what is wrong, on stderr, and nothing else that looks like an error."""
    assert ended.code == code if code is not None else ended.code > 0, ended
    assert ended.last_line.startswith("error: "), ended.err
    assert message in ended.last_line, ended.err
    assert ended.err.count("error: ") == 1, ended.err
    assert "Traceback" not in ended.err, ended.err


def _environment(pid: int) -> list[bytes]:
    return _read(f"/proc/{pid}/environ").split(b"\0")


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""  # it has ended, or is another user's
