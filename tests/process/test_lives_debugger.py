"""An engine in a debugger, or stopped: the feeder waits, uses nothing, and the text is right."""

from __future__ import annotations

import importlib.util
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests import lives
from tests.processes import PATIENCE_S, ROOT, Process, Room, lock_holder
from tests.terminals import Terminal, terminal

pytestmark = pytest.mark.usefixtures("device_as_before")

TOKENS = 12
PROMPT = "(Pdb) "


def line_of(file: str, text: str) -> str:
    """Where in ``file`` the line with ``text`` is, as pdb wants to know it."""
    lines = (ROOT / file).read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return f"{file}:{number}"


def debug(it: Terminal, room: Room, long_text: list[str]) -> None:
    """Break at the first product, interrupt the prompt, go on to the right text, and leave."""
    it.read_until(PROMPT)
    said = it.answer(f"break {line_of('engine/linear.py', 'format == PACKED:')}")
    assert "Breakpoint 1 at" in said, said
    assert "if lease.grant.format == PACKED:" in it.answer("continue")
    assert "torch.Size([1, 4, 128])" in it.answer("p x.shape")
    feeder = lock_holder(room, "feeder")
    assert feeder is not None
    for _ in range(3):
        it.interrupt(PROMPT)
    assert "torch.Size([1, 4, 128])" in it.answer("p x.shape")  # it stands where it stood
    assert lock_holder(room, "feeder") == feeder == lives.status(room)["pid"]
    it.answer("clear 1")
    said = it.answer("continue")
    assert "exited via sys.exit(). Exit status: 0" in said, said
    expected = " ".join(long_text[:TOKENS])
    assert expected in " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).split())
    assert lives.status(room)["pid"] == feeder
    it.type("q\n")
    it.popen.wait(PATIENCE_S)


def test_pdb_against_a_running_feeder(room: Room, long_store: Path, long_text: list[str]) -> None:
    feeder = room.feeder(*lives.feeder_flags(long_store, 3))
    with terminal(room, "-m", "pdb", "-m", "engine", *lives.engine_flags(TOKENS)) as it:
        debug(it, room, long_text)
    assert feeder.popen.poll() is None
    again = room.engine(*lives.engine_flags(TOKENS)).wait()
    assert again.code == 0 and again.out.split() == long_text[:TOKENS]


def test_the_launcher_with_a_debugger(room: Room, long_store: Path, long_text: list[str]) -> None:
    flags = [*lives.feeder_flags(long_store, 3), *lives.engine_flags(TOKENS)]
    with terminal(room, "launch.py", "--debug", *flags) as it:
        debug(it, room, long_text)
        assert it.popen.returncode is not None
    room.settle()


def test_a_stopped_engine_costs_nothing(room: Room, long_store: Path, long_text: list[str]) -> None:
    """The bound is on what the feeder computes, not on how long anything takes."""
    feeder = room.feeder(*lives.feeder_flags(long_store, 3))
    engine = room.engine(*lives.engine_flags(400))
    lives.until_generating(engine)
    for moment in range(2):
        lives.pause(0.1 + 0.2 * moment)
        assert engine.popen.poll() is None, "the generation is too short"
        engine.signal(signal.SIGSTOP)
        lives.pause(0.5)  # what was on its way when it was stopped may still be filled
        start, computed = time.monotonic(), lives.cpu_s(feeder.pid)
        lives.pause(4.0)
        share = (lives.cpu_s(feeder.pid) - computed) / (time.monotonic() - start)
        assert share < 0.01, share
        fields = lives.status(room)  # it answers, without the engine's part
        assert fields["engine_pid"] == engine.pid and "engine_uses" not in fields
        engine.signal(signal.SIGCONT)
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:400], ended.err
    assert "waiting" not in ended.err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def attach(engine: Process, port: int) -> None:
    """What an editor says to begin with, in the debug adapter protocol."""
    import json

    def request(number: int, command: str, **arguments: object) -> bytes:
        message = {"seq": number, "type": "request", "command": command, "arguments": arguments}
        body = json.dumps(message).encode()
        return b"Content-Length: %d\r\n\r\n" % len(body) + body

    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as editor:
        editor.sendall(request(1, "initialize", adapterID="test", clientID="test"))
        editor.sendall(request(2, "attach", justMyCode=False))
        heard = b""
        while b'"initialized"' not in heard:
            heard += editor.recv(65536)
        editor.sendall(request(3, "configurationDone"))
        engine.wait()


def test_debugpy_waits_for_an_editor(room: Room, long_store: Path, long_text: list[str]) -> None:
    if importlib.util.find_spec("debugpy") is None:
        pytest.skip("debugpy is not installed")
    room.feeder(*lives.feeder_flags(long_store, 3))
    port = free_port()
    engine = room.engine(f"--debugpy={port}", *lives.engine_flags(TOKENS))
    engine.until_said(f"waiting for a debugger to attach on 127.0.0.1:{port}")
    assert engine.out == ""
    attach(engine, port)
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text[:TOKENS], ended.err
