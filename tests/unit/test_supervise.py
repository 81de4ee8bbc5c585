"""The launcher's supervision, with a launcher and children that are real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20.0

#: Starts the children named on its command line, tells their pids, and waits for the first of them.
LAUNCHER = """
import json, signal, sys
import common.supervise as supervise
from common.errors import WeightFeederError
children, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
supervise.GRACE_S = options.get("grace_s", 30.0)
python = [sys.executable, "-c"]
try:
    with supervise.Supervisor() as supervisor:
        supervisor.leave_interrupts = options.get("leave_interrupts", False)
        if "run" in options:
            supervisor.run("quantizer", [*python, options["run"]])
        started = [
            supervisor.start(name, [*python, code], foreground=options.get("foreground") == name)
            for name, code in children
        ]
        print(json.dumps([child.process.pid for child in started]), flush=True)
        if options.get("brief"):
            print("idle", flush=True)
            supervisor.wait(until=None, timeout_s=0.2)
        else:
            supervisor.wait(until=started[0])
    print("good", flush=True)
except WeightFeederError as error:
    print(f"{type(error).__name__} {error.exit_code}: {error}", flush=True)
    sys.exit(error.exit_code)
"""

#: A child that ends as a feeder would: on its leash's or a signal's word. "end" says how it ended.
OBEDIENT = """
import os, select, signal, sys
from common.process import Leash, SignalFlag
from common.wait import Wakeup
leash, wakeup = Leash(), Wakeup()
flag = SignalFlag(wakeup)
os.write(1, b"up\\n")
ready = select.select([wakeup.fd, leash.fd], [], [])[0]
os.write(1, b"leash\\n" if leash.fd in ready else b"%d\\n" % flag.received)
"""
LEASH = "from common.process import Leash; leash = Leash(); "
REPORT = LEASH + "leash.report({text!r}); "
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"no\\n"))
os.write(1, b"up\\n")
while True: time.sleep(60)
"""
GOOD = "pass"


class Launch:
    """A launcher, and whatever it and its children say."""

    def __init__(self, *children: tuple[str, str], **options: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, json.dumps(children), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self.pids: list[int] = []
        self._watches: list[int] = []
        self.said: list[str] = []

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for fd in self._watches:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def hear(self, *words: str) -> None:
        """Until all of ``words`` have been said, each as a line, in any order."""
        missing = list(words)
        assert self.process.stdout is not None
        while missing:
            assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], f"no {missing}"
            line = self.process.stdout.readline().decode().rstrip("\n")
            assert line or self.process.poll() is None, f"ended without {missing}: {self.said}"
            if line.startswith("["):
                self.pids = json.loads(line)
                for pid in self.pids:
                    with suppress(ProcessLookupError):  # it may be gone already
                        self._watches.append(os.pidfd_open(pid))
                line = "pids"
            self.said.append(line)
            if line in missing:
                missing.remove(line)

    def end(self) -> tuple[int, str]:
        """The launcher's exit code and its last word. No child is left."""
        rest, _ = self.process.communicate(timeout=PATIENCE_S)
        self.said += rest.decode().splitlines()
        self.no_child_is_left()
        return self.process.returncode, self.said[-1]

    def no_child_is_left(self) -> None:
        for fd in self._watches:
            assert select.select([fd], [], [], PATIENCE_S)[0], "a child lives"


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WEIGHT_FEEDER_LEASH", raising=False)
    yield


def test_when_the_first_has_ended_well_the_others_are_ended() -> None:
    wait = "import sys; sys.stdin.readline()"
    with Launch(("engine", wait), ("feeder", OBEDIENT), foreground="engine") as launch:
        launch.hear("pids", "up")
        assert launch.process.stdin is not None
        launch.process.stdin.write(b"go on\n")  # a child in the foreground has our input
        launch.process.stdin.flush()
        assert launch.end() == (0, "good")
        assert "15" in launch.said


def test_a_child_that_is_not_in_the_foreground_has_no_input() -> None:
    code = "import sys; assert sys.stdin.read() == ''"
    with Launch(("engine", code)) as launch:
        assert launch.process.stdin is not None
        launch.process.stdin.write(b"not for it\n")
        launch.hear("pids")
        assert launch.end() == (0, "good")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(7)", (7, "ChildFailed 7: the feeder ended with exit code 7")),
        (GOOD, (1, "ChildFailed 1: the feeder ended before the engine had")),
        (
            "import os; os.kill(os.getpid(), 9)",
            (1, "ChildFailed 1: the feeder was killed by SIGKILL"),
        ),
        (
            REPORT.format(text="no memory") + "raise SystemExit(3)",
            (3, "ChildFailed 3: feeder: no memory"),
        ),
        (
            REPORT.format(text="bad, then killed") + "import os; os.kill(os.getpid(), 11)",
            (1, "ChildFailed 1: feeder: bad, then killed"),
        ),
        (
            REPORT.format(text="x" * 50_000) + "raise SystemExit(1)",
            (1, "ChildFailed 1: feeder: " + "x" * 50_000),
        ),
        (
            REPORT.format(text="first") + "leash.report('second'); raise SystemExit(1)",
            (1, "ChildFailed 1: feeder: first"),
        ),
    ],
)
def test_a_child_that_fails_ends_all_and_says_why(code: str, expected: tuple[int, str]) -> None:
    with Launch(("engine", OBEDIENT), ("feeder", code)) as launch:
        launch.hear("pids")
        assert launch.end() == expected


def test_the_child_that_is_waited_for_may_fail_too() -> None:
    code = REPORT.format(text="no prompt") + "raise SystemExit(2)"
    with Launch(("engine", code), ("feeder", OBEDIENT)) as launch:
        launch.hear("pids")
        assert launch.end() == (2, "ChildFailed 2: engine: no prompt")


def test_the_first_cause_is_told_not_its_consequence() -> None:
    """The engine fails because the feeder did, and ends before it."""
    told = "import os, time; os.write(1, b'told\\n'); time.sleep(60)"
    feeder = REPORT.format(text="the cause") + told
    then = "import sys; sys.stdin.readline(); leash.report('the consequence'); raise SystemExit(5)"
    engine = LEASH + then
    with Launch(("engine", engine), ("feeder", feeder), foreground="engine") as launch:
        launch.hear("pids", "told")
        assert launch.process.stdin is not None
        launch.process.stdin.write(b"\n")
        launch.process.stdin.flush()
        assert launch.end() == (5, "ChildFailed 5: feeder: the cause")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_children_first(number: signal.Signals) -> None:
    with Launch(("engine", OBEDIENT), ("feeder", OBEDIENT)) as launch:
        launch.hear("pids", "up", "up")
        launch.process.send_signal(number)
        assert launch.end() == (128 + number, f"Terminated {128 + number}: ended by {number.name}")
        assert launch.said.count("15") == 2  # not SIGINT: they are ended, in order, by us


def test_ctrl_c_on_the_terminal_reaches_the_launcher_alone() -> None:
    with Launch(("engine", OBEDIENT), ("feeder", OBEDIENT)) as launch:
        launch.hear("pids", "up", "up")
        os.killpg(launch.process.pid, signal.SIGINT)
        assert launch.end() == (130, "Terminated 130: ended by SIGINT")
        assert launch.said.count("15") == 2


def test_a_launcher_that_is_killed_takes_its_children_along() -> None:
    with Launch(("engine", OBEDIENT), ("feeder", OBEDIENT)) as launch:
        launch.hear("pids", "up", "up")
        launch.process.kill()
        launch.no_child_is_left()
        launch.hear("leash", "leash")


def test_a_child_that_does_not_end_is_killed() -> None:
    with Launch(("engine", OBEDIENT), ("feeder", STUBBORN), grace_s=0.2) as launch:
        launch.hear("pids", "up", "up")
        launch.process.terminate()
        assert launch.end()[0] == 143
        assert "no" in launch.said  # it was asked first


def test_a_child_that_is_stopped_ends_in_order() -> None:
    with Launch(("engine", OBEDIENT), ("feeder", OBEDIENT)) as launch:
        launch.hear("pids", "up", "up")
        os.kill(launch.pids[1], signal.SIGSTOP)
        launch.process.terminate()
        assert launch.end()[0] == 143
        assert launch.said.count("15") == 2


def test_interrupts_are_left_to_a_child_in_the_foreground() -> None:
    """Ctrl-C at a debugger's prompt: neither we nor the feeder hear of it, and we do not spin."""
    options = {"foreground": "engine", "leave_interrupts": True}
    with Launch(("engine", OBEDIENT), ("feeder", OBEDIENT), **options) as launch:
        launch.hear("pids", "up", "up")
        os.killpg(launch.process.pid, signal.SIGINT)
        assert launch.end() == (0, "good")
        assert launch.said.count("2") == launch.said.count("15") == 1


def test_a_wait_for_a_while_ends_also_after_an_interrupt() -> None:
    options = {"brief": True, "leave_interrupts": True}
    with Launch(("feeder", OBEDIENT), **options) as launch:
        launch.hear("pids", "up", "idle")
        launch.process.send_signal(signal.SIGINT)
        assert launch.end() == (0, "good")
        assert "15" in launch.said


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (GOOD, (0, "good")),
        ("raise SystemExit(4)", (4, "ChildFailed 4: the quantizer ended with exit code 4")),
    ],
)
def test_a_child_may_come_before_the_others(code: str, expected: tuple[int, str]) -> None:
    with Launch(("engine", GOOD), run=code) as launch:
        if expected[0] == 0:
            launch.hear("pids")
        assert launch.end() == expected
