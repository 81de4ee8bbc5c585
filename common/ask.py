"""A question to a running feeder, from a process or a thread that is not its engine."""

from __future__ import annotations

import time

from common import protocol as p
from common.channel import Client, Poller
from common.errors import PeerError
from common.process import Lock, remove_run_directory, run_directory

PATIENCE_S = 5.0
SWAP_PATIENCE_S = 120.0  # a new arena waits for the weights that are in use


class FeederEnded(PeerError):
    """The feeder was there, and ended before it answered."""


def ask(name: str, request: p.Message, patience_s: float = PATIENCE_S) -> p.Message:
    """The answer of feeder ``name``. PeerError if it is not there, is silent, or refuses."""
    directory = run_directory(name)
    pid = Lock.holder(directory / "feeder.lock")
    if pid is None:
        remove_run_directory(directory)
        raise PeerError(
            f"no feeder {name!r} is running: start one with python -m feeder --model STORE"
        )
    client, poller = Client(directory / "feeder.sock"), Poller()
    client.register(poller)
    try:
        deadline = time.monotonic() + patience_s
        sent = False
        while time.monotonic() < deadline:
            # Asked before its messages are read: its last words may be on their way.
            ended = Lock.holder(directory / "feeder.lock") is None
            sent = sent or client.send(request)
            poller.wait(0.02 if not sent else 0.2)
            for message in client.receive():
                if isinstance(message, p.Failure):
                    raise PeerError(message.text)
                if isinstance(message, p.Status | p.Done):
                    return message
            if ended:
                raise FeederEnded(f"feeder {name!r}, pid {pid}, ended before it answered")
    finally:
        client.close()
    raise PeerError(f"feeder {name!r}, pid {pid}, does not answer: it is loading, or stopped")
