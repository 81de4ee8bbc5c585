"""Two processes with lives of their own: an engine's text, disturbances, and how many of them.

``WEIGHT_FEEDER_CHAOS=full`` raises the numbers; ``WEIGHT_FEEDER_TEST_DEVICE=cuda`` runs the same
tests on a GPU, with ``WEIGHT_FEEDER_TEST_SLOTS=packed`` or ``dequantized``: there a product is rounded
otherwise if its weight is packed, so that a text has one or the other throughout.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from common import protocol as p
from feeder import control
from tests.processes import PATIENCE_S, Process, Room, until

DEVICE = os.environ.get("WEIGHT_FEEDER_TEST_DEVICE", "cpu")
FULL = os.environ.get("WEIGHT_FEEDER_CHAOS") == "full"
STRATEGIES = ("ring", "resident", "on-demand")
#: Those that give the same text.
SLOTS = (
    ("packed", "dequantized")
    if DEVICE == "cpu"
    else (os.environ.get("WEIGHT_FEEDER_TEST_SLOTS", "packed"),)
)
LAYERS = 2 if DEVICE == "cpu" else 32  # so that a token takes some milliseconds on either
#: Tokens of the longest text: what is disturbed the full number of times must not end before. On a GPU
#: the deeper model takes some 30 ms for each.
LONGEST = (4000 if DEVICE == "cpu" else 1000) if FULL else 700

#: Some processes are started ahead of their use, as far as there are cores for them.
AHEAD = max(1, min(10, (os.cpu_count() or 1) // 2 + 1))


def count(default: int, full: int) -> int:
    """How many times something is done."""
    return full if FULL else default


def feeder_flags(
    store: Path, cache: object = 5, strategy: str = "ring", slots: str = ""
) -> list[str]:
    slots = slots or ("auto" if len(SLOTS) > 1 else SLOTS[0])
    return [
        f"--model={store}", f"--cache={cache}", f"--strategy={strategy}", f"--slots={slots}",
        f"--device={DEVICE}",
    ]  # fmt: skip


def engine_flags(tokens: int) -> list[str]:
    """A generation whose text depends on every bit: it is sampled, with a seed."""
    prompt = "--prompt=5 17 300 2"
    return [prompt, f"--max-new-tokens={tokens}", "--temperature=1", "--seed=3"]


def ask(room: Room, request: p.Message, name: str = "default") -> p.Message:
    """The answer of a room's feeder. PeerError if it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(room.runtime))
        return control.ask(name, request, PATIENCE_S)


def status(room: Room, name: str = "default") -> dict[str, Any]:
    """The fields of a feeder's status."""
    answer = ask(room, p.StatusRequest(), name)
    assert isinstance(answer, p.Status)
    return answer.fields


def stop(room: Room, feeder: Process, name: str = "default") -> None:
    """End a feeder politely."""
    try:
        ask(room, p.Stop(), name)
    except control.FeederEnded:
        pass
    assert feeder.wait().code == 0


def held(fields: dict[str, Any]) -> int:
    """Slots that an engine has."""
    return fields["slots_in_use"] + fields["slots_revoked"]


def until_generating(engine: Process) -> None:
    """Wait until an engine has written its first token."""
    engine.until(lambda: engine.out, "writes a token")


def resident_bytes(pid: int) -> int:
    """A process's memory in RAM, shared memory left out."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def damage(host_store: Path) -> None:
    """Turn over a bit of a weight."""
    with host_store.open("r+b") as held:
        held.seek(128 * 192 // 2 + 1000)  # amid the first layer
        byte = held.read(1)[0]
        held.seek(-1, os.SEEK_CUR)
        held.write(bytes([byte ^ 4]))


def slots_of(feeder: Process) -> Path:
    """The feeder's segment of slots, as any process of the same user reaches it."""
    for entry in Path(f"/proc/{feeder.pid}/fd").iterdir():
        if os.readlink(entry).startswith("/memfd:weight-feeder-slots"):
            return entry
    raise AssertionError("the feeder has no segment")


def corrupt(feeder: Process) -> None:
    """Change one byte in each run of 64 of all slots; once more, and they are as before."""
    with slots_of(feeder).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for at in range(0, len(memory), 64):
            memory[at] ^= 0x10


class Ahead:
    """Processes of one module that have imported all they need, and begin when they are told."""

    def __init__(self, room: Room, module: str, total: int) -> None:
        """``total``: how many will be begun at the most."""
        self._room, self._module, self._left = room, module, total
        self._waiting: list[tuple[Process, Path]] = []
        self._refill()

    def begin(self, *flags: object) -> Process:
        """The next process, as if it had been started with ``flags`` now."""
        process, gate = self._waiting.pop(0)
        self._refill()
        draft = gate.with_suffix(".draft")
        draft.write_text(json.dumps([*map(str, flags)]))
        draft.rename(gate)
        return process

    def close(self) -> None:
        """End those that were not used."""
        for process, _ in self._waiting:
            process.popen.kill()
            process.popen.wait()
        self._waiting.clear()

    def _refill(self) -> None:
        while self._left and len(self._waiting) < AHEAD:
            gate = self._room.path / f"{self._module}-{self._left}.gate"
            process = self._room.start("-m", "tests.process.gated", gate, self._module, DEVICE)
            self._waiting.append((process, gate))
            self._left -= 1


def wait_until_serving(room: Room, feeder: Process, name: str = "default") -> None:
    """Wait until that very feeder answers."""

    def answers() -> bool:
        return (room.directory(name) / "feeder.lock").exists() and "serving" in feeder.err

    feeder.until(answers, "serves")


def device_free_bytes() -> int:
    """Free memory of the device, this process's unused part of it given back first."""
    if DEVICE == "cpu":
        return 0
    import torch

    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def until_device_free(bytes_before: int) -> None:
    """Wait until as much is free as before. A leak would be some MB a process."""
    until(
        lambda: device_free_bytes() >= bytes_before - (48 << 20),
        lambda: f"{bytes_before:,} bytes of device memory were free, now {device_free_bytes():,}",
    )


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Do ``work`` again and again, in another thread, for as long as the context lasts."""
    failures: list[BaseException] = []
    ending = threading.Event()

    def repeat() -> None:
        try:
            while not ending.is_set():
                work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
    if failures:
        raise failures[0]


def pause(seconds: float) -> None:
    """Let the others get on. Nothing is measured against it."""
    time.sleep(seconds)
