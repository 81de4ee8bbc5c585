"""However a run ends, and whenever: both processes stop, the first cause is the last line, the exit
code says that something went wrong, and nothing stays behind (which each test's room checks)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from feeder.quantize import quantize_checkpoint
from tests.checkpoints import make_hollow_checkpoint
from tests.processes import (
    PATIENCE_S,
    ROOT,
    SHARED,
    Ended,
    Process,
    Room,
    assert_refused,
    lock_holder,
    until,
)

SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def send(launcher: Process, name: str) -> None:
    """The signal as a user sends it: Ctrl-C reaches the process group, the others one process."""
    if name == "SIGINT":
        launcher.ctrl_c()
    else:
        launcher.signal(signal.Signals[name])


def assert_ended_by(ended: Ended, name: str) -> None:
    assert_refused(ended, f"error: ended by {name}", code=SIGNALS[name])


@pytest.fixture
def endless(demo_store: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that would take half an hour."""
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"input": "1.1+2.3=?"}\n' * 1000)
    return [f"--model={demo_store}", f"--prompts={source}", "--cache=20"]


def generating(room: Room, flags: list[str], *names: str) -> Iterator[tuple[str, Process]]:
    """Launchers that run beside each other, each as soon as there is some text of its answer."""
    launchers = {n: room.launch(*flags, f"--name={n}", f"--output={room.path / n}") for n in names}
    for name, launcher in launchers.items():
        launcher.until(lambda it=launcher: it.out, "begins to answer")
        yield name, launcher


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes a moment to quantize and to load: 200 million weights, all of them 0."""
    path = tmp_path_factory.mktemp("large") / "checkpoint"
    return make_hollow_checkpoint(path, dtype="BF16", intermediate_size=65536)


@pytest.fixture(scope="module")
def large_store(large_checkpoint: Path) -> Path:
    store = large_checkpoint.with_name("store")
    quantize_checkpoint(large_checkpoint, store, "cpu", progress=False, method="absmax")
    return store


# While it generates -----------------------------------------------------------------------------


def test_a_signal_while_it_generates(room: Room, endless: list[str]) -> None:
    for name, launcher in generating(room, endless, "SIGINT", "SIGTERM", "SIGHUP"):
        if name == "SIGHUP":  # whoever stopped a child, in a debugger or by Ctrl-Z, wants its end
            os.kill(launcher.child("engine"), signal.SIGSTOP)
        send(launcher, name)
        assert_ended_by(launcher.wait(), name)


def test_a_child_ends_while_it_generates(room: Room, endless: list[str]) -> None:
    for name, launcher in generating(room, endless, "feeder", "engine", "feeder.ended"):
        child, _, asked = name.partition(".")
        os.kill(launcher.child(child), signal.SIGTERM if asked else signal.SIGKILL)
        ended = launcher.wait()
        if asked:  # it ends in order, but not because the launcher wanted it to
            assert_refused(ended, f"error: the {child} ended with exit code 143", code=143)
        else:
            assert_refused(ended, f"error: the {child} was killed by SIGKILL", code=1)


def test_the_launcher_is_killed_while_it_generates(room: Room, endless: list[str]) -> None:
    for _, launcher in generating(room, endless, "orphans"):
        launcher.signal(signal.SIGKILL)
        assert launcher.wait().code == -signal.SIGKILL
        room.settle()
        assert launcher.err.count("the launcher is gone") == 2, launcher.err
        assert "Traceback" not in launcher.err


def test_nobody_reads_the_text_any_more(room: Room, endless: list[str]) -> None:
    """As `launch.py | head -1`: it ends, without a traceback."""
    read_end, write_end = os.pipe()
    with open(room.path / "err", "wb") as err:
        launcher = subprocess.Popen(
            [sys.executable, "launch.py", *endless],
            cwd=ROOT, env=room.environment, stdin=subprocess.DEVNULL, stdout=write_end, stderr=err,
        )  # fmt: skip
    os.close(write_end)
    os.read(read_end, 1)
    os.close(read_end)
    assert launcher.wait(PATIENCE_S) > 0
    assert "Traceback" not in (room.path / "err").read_text()


# Earlier ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_once(room: Room, endless: list[str], name: str) -> None:
    launcher = room.launch(*endless)
    launcher.child("engine")
    send(launcher, name)
    assert_ended_by(launcher.wait(), name)


@pytest.mark.parametrize("child", ["feeder", "engine"])
def test_a_child_is_killed_at_once(room: Room, endless: list[str], child: str) -> None:
    launcher = room.launch(*endless)
    os.kill(launcher.child(child), signal.SIGKILL)
    assert_refused(launcher.wait(), f"error: the {child} was killed by SIGKILL", code=1)


def test_the_launcher_is_killed_at_once(room: Room, endless: list[str]) -> None:
    launcher = room.launch(*endless)
    launcher.child("feeder")
    launcher.signal(signal.SIGKILL)
    launcher.wait()
    room.settle()


def test_an_engine_that_waits_for_a_feeder_is_interrupted(room: Room) -> None:
    engine = room.engine("--prompt=x", "--name=lonely")
    engine.until_said("waiting for a feeder called 'lonely'")
    engine.ctrl_c()
    ended = engine.wait()
    assert ended.code == 130
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_the_end_of_the_launcher_while_it_quantizes(
    room: Room, large_checkpoint: Path, name: str
) -> None:
    stores = room.cache / "weight-feeder"
    launcher = room.launch(f"--model={large_checkpoint}", "--feeder-only")
    launcher.until(lambda: [*stores.glob(".*.partial-*/*.safetensors")], "writes the store")
    send(launcher, name)
    ended = launcher.wait()
    if name != "SIGKILL":
        assert_ended_by(ended, name)
    room.settle()
    assert not [path for path in stores.iterdir() if not path.name.endswith(".lock")]


def test_ctrl_c_while_another_makes_the_same_store(room: Room, large_checkpoint: Path) -> None:
    """The launcher that waits for another one's quantizer is still there for its user."""
    store = room.path / "store"
    with open(room.path / ".store.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the other launcher holds it
        launcher = room.launch(f"--model={large_checkpoint}", f"--store={store}", "--feeder-only")
        lock = f"{room.path / '.store.lock'}"
        opened = Path(f"/proc/{launcher.pid}/fd")
        launcher.until(lambda: any(_points_to(fd, lock) for fd in opened.iterdir()), "waits")
        launcher.ctrl_c()
        assert_ended_by(launcher.wait(), "SIGINT")


def _points_to(link: Path, target: str) -> bool:
    try:
        return os.readlink(link) == target
    except OSError:
        return False


@pytest.mark.parametrize("keep", [[], ["--keep-store"]])
def test_a_feeder_is_ended_while_it_loads(room: Room, large_store: Path, keep: list[str]) -> None:
    """Also with --keep-store: what is kept is a whole store or none."""
    before = room.shared_entries()
    directory, name = room.directory(room.name), f"--name={room.name}"
    for _ in range(10):  # until it is caught in the act
        feeder = room.start("-m", "feeder", f"--model={large_store}", "--cache=1", name, *keep)
        feeder.until((directory / "feeder.lock").exists, "begins")
        feeder.signal(signal.SIGSTOP)
        loading = not (directory / "feeder.sock").exists()
        feeder.signal(signal.SIGTERM)
        feeder.signal(signal.SIGCONT)
        assert feeder.wait().code == 143
        kept = room.shared_entries() - before
        assert not (loading and kept)
        for entry in kept:
            (SHARED / entry).unlink()
        if loading:
            return
    pytest.fail("the feeder was never caught while it loaded")


@pytest.mark.parametrize("child", ["feeder", "engine"])
def test_the_end_of_the_launcher_reaches_a_child_that_loads(
    room: Room, large_store: Path, child: str
) -> None:
    launcher = room.launch(f"--model={large_store}", f"--{child}-only", "--cache=1")
    pid = launcher.child(child)
    until(lambda: lock_holder(room, child) == pid, lambda: "it never began")
    launcher.signal(signal.SIGKILL)
    launcher.wait()
    room.settle()


def test_a_signal_reaches_a_poll_that_another_thread_received_it_for(room: Room) -> None:
    """A handler runs in the main thread, and only when that is not in a poll: it must be woken."""
    script = """
import signal, threading
from common.channel import Poller
from common.process import SignalFlag
from common.wait import Wakeup

wakeup, poller, enough = Wakeup(), Poller(), threading.Event()
flag = SignalFlag(wakeup)
poller.add(wakeup.fd)

def annoy():
    while not enough.wait(0.002):
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=annoy, daemon=True).start()
for _ in range(50):
    flag.received = 0
    while not flag.received:
        poller.wait(None)
        wakeup.clear()
enough.set()
print("woken")
"""
    ended = room.start("-c", script).wait()
    assert (ended.code, ended.out) == (0, "woken\n"), ended.err


def test_no_library_takes_sigterm_for_a_failure_of_its_own(room: Room) -> None:
    """What a signal raises passes through `except Exception`, of which transformers has many."""
    script = """
import os, signal, sys, time
from common.entry import run_process
from common.process import raise_on_termination

def work(leash):
    raise_on_termination()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except Exception:
        print("swallowed")

sys.exit(run_process("test", False, work))
"""
    ended = room.start("-c", script).wait()
    assert (ended.code, ended.out, ended.err) == (143, "", "")


# By itself --------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    """In the last tensor, where no header is."""
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "weight": ("feeder", "weights-00001-of-00001.safetensors", flip_a_bit, "the checksum of"),
    "resident": ("engine", "residents-00001-of-00001.safetensors", flip_a_bit, "the checksum of"),
    "cut-file": ("feeder", "weights-00001-of-00001.safetensors", cut, "is truncated"),
    "index": ("feeder", "store.json", cut, "not valid JSON"),
    "tokenizer": ("feeder", "tokenizer.json", cut, "tokenizer.json: the checksum is of"),
    "config": ("feeder", "config.json", cut, "config.json: the checksum is of"),
}


def test_a_damaged_store(room: Room, demo_store: Path) -> None:
    launchers = {}
    for what, (who, file, damage, _) in DAMAGES.items():
        store = room.path / what
        shutil.copytree(demo_store, store)
        damage(store / file)
        alone = ["--feeder-only"] if who == "feeder" and what != "weight" else []
        launchers[what] = room.launch(f"--model={store}", f"--name={what}", *alone)
    for what, (who, _, _, message) in DAMAGES.items():
        ended = launchers[what].wait()
        assert_refused(ended, f"error: {who}: ", code=1)
        assert message in ended.last_line
        assert str(room.path / what) in ended.last_line
        assert ended.out == ""


def test_a_prompt_that_fails_after_others(room: Room, demo_store: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "prompts.json", tmp_path / "answers.jsonl"
    source.write_text(json.dumps([{"input": "1+2=?"}, {"input": "1+" * 400}, {"input": "1+3=?"}]))
    flags = [f"--model={demo_store}", f"--prompts={source}", f"--output={output}"]
    ended = room.launch(*flags).wait()
    assert_refused(ended, "engine: the prompt has 8", code=2)
    assert "tokens, the model's context 512" in ended.last_line
    answers = output.read_text().splitlines()
    assert [json.loads(line)["input"] for line in answers] == ["1+2=?"]
