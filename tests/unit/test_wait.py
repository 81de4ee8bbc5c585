"""Waking a poll loop, and the order in which begun work is found complete."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.wait import Pending, Wakeup, Work, Worker

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 10.0


def readable(fd: int, timeout_s: float = 0.0) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_a_wakeup_is_readable_until_it_is_cleared() -> None:
    wakeup = Wakeup()
    assert not readable(wakeup.fd)
    wakeup.clear()  # blocks nothing
    for _ in range(100_000):  # more than a pipe holds
        wakeup.set()
    assert readable(wakeup.fd)
    wakeup.clear()
    assert not readable(wakeup.fd)
    wakeup.set()
    assert readable(wakeup.fd)
    wakeup.close()
    wakeup.close()
    wakeup.set()  # a thread may be late


def test_a_wakeup_works_across_threads() -> None:
    wakeup = Wakeup()
    thread = threading.Thread(target=wakeup.set)
    thread.start()
    assert readable(wakeup.fd, PATIENCE_S)
    thread.join()
    wakeup.close()


def test_a_wakeup_is_not_inherited() -> None:
    wakeup = Wakeup()
    code = f"import os; os.fstat({wakeup.fd})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, close_fds=False
    )
    assert b"Bad file descriptor" in done.stderr
    wakeup.close()


def test_a_signal_wakes_a_loop_that_is_about_to_sleep() -> None:
    """In a process of its own: the handler alone would be run only when the poll ends."""
    code = """
import os, select, signal, sys
from common.process import SignalFlag
from common.wait import Wakeup
wakeup = Wakeup()
flag = SignalFlag(wakeup)
print("ready", flush=True)
while not flag.received:
    select.select([wakeup.fd], [], [])
    wakeup.clear()
print(signal.Signals(flag.received).name)
"""
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.communicate(timeout=PATIENCE_S)[0] == f"{number.name}\n"
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate()


class Manual(Work):
    def __init__(self) -> None:
        self.ready = False

    def complete(self) -> bool:
        return self.ready


@given(st.permutations(range(8)))
def test_work_is_found_complete_in_the_order_it_was_begun(order: list[int]) -> None:
    pending: Pending[int] = Pending()
    works = [Manual() for _ in range(8)]
    for token, work in enumerate(works):
        pending.add(work, token)
    found: list[int] = []
    for which in order:
        works[which].ready = True
        found += pending.done()
        done = next((i for i, work in enumerate(works) if not work.ready), 8)
        assert found == list(range(done))
        assert len(pending) == 8 - done
    assert pending.done() == []


def test_a_worker_works_in_order_and_wakes_the_loop() -> None:
    wakeup = Wakeup()
    worker = Worker("test", wakeup)
    pending: Pending[int] = Pending()
    gate, seen = threading.Event(), []
    pending.add(worker.submit(lambda: gate.wait(PATIENCE_S)), -1)
    for number in range(50):
        pending.add(worker.submit(lambda number=number: seen.append(number)), number)
    assert pending.done() == []
    gate.set()
    done: list[int] = []
    while len(done) < 51:
        assert readable(wakeup.fd, PATIENCE_S)
        wakeup.clear()
        done += pending.done()
    assert done == [-1, *range(50)]
    assert seen == list(range(50))
    worker.close()
    wakeup.close()


def test_closing_a_worker_lets_it_finish() -> None:
    wakeup = Wakeup()
    worker = Worker("test", wakeup)
    seen: list[int] = []
    works = [worker.submit(lambda number=number: seen.append(number)) for number in range(20)]
    worker.close()
    assert seen == list(range(20))
    assert all(work.complete() for work in works)
    wakeup.close()


def test_what_fails_on_the_worker_is_raised_in_the_loop() -> None:
    wakeup = Wakeup()
    worker = Worker("test", wakeup)
    pending: Pending[str] = Pending()
    pending.add(worker.submit(lambda: None), "good")
    pending.add(worker.submit(lambda: int("x")), "bad")
    worker.close()
    assert readable(wakeup.fd)
    with pytest.raises(ValueError, match="invalid literal"):
        pending.done()
    wakeup.close()


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        wakeup = Wakeup()
        Worker("test", wakeup).close()
        wakeup.close()
    assert len(os.listdir("/proc/self/fd")) == before
