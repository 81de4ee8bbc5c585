"""The line to whatever feeder has the run directory: finds it, notices that it is gone, finds the next.

Knows who is at the other end, and nothing of weights: those messages it hands on. Guarded by its
owner's lock.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import protocol as p
from common.channel import Client, Poller
from common.errors import PeerError, ProtocolError
from common.formats import FORMATS
from common.log import log
from common.process import Lock, watch

HELLO_INTERVAL_S = 0.1
HELLO_REPEAT_S = 1.0
QUIET_S = 0.5  # before the engine says what it waits for
DYING_S = 5.0  # how long a killed process may take to end
_FORMATS = ",".join(FORMATS)
_MALFORMED_SHOWN = 3
_COMPLAINTS = 100


class Connection:
    """``feeder``: the welcome of the feeder at the other end, None while there is none. ``absent_s``: how
    long there was none, between one that went and the next.

    ``found`` is called when a feeder has answered, ``lost`` when it is gone.
    """

    def __init__(
        self,
        directory: Path,
        leash_fd: int | None,
        found: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        self._directory, self._leash_fd = directory, leash_fd
        self._found, self._lost = found, lost
        self.feeder: p.Welcome | None = None
        self.absent_s, self._lost_at = 0.0, 0.0
        self.malformed = self.ignored = self.lost_feeders = self._complaints = 0
        self._fingerprint = ""  # of the store that this engine works with
        self._kind: tuple[str, str] | None = None  # dtype and device that the model was built for
        self._draft = ""  # the fingerprint of the draft model that the first feeder had
        self._refused_pid = 0
        self._said = ""
        self._ready: set[int] = set()
        self._open()

    # Calls -------------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> None:
        """Until a message or a death is there, or the time is up."""
        if self.feeder is None:
            timeout_s = min(timeout_s, HELLO_INTERVAL_S)
        self._ready = self._poller.wait(timeout_s)

    def messages(self) -> Iterator[p.Message]:
        """What the feeder says of weights. Everything else is dealt with here. Never blocks."""
        ready, self._ready = self._ready, set()
        if self._leash_fd in ready:
            self._orphaned()
        channel = self._channel
        for message in channel.receive():
            if self._is_ours(message):
                assert not isinstance(message, ProtocolError)
                yield message
            if channel is not self._channel:
                return  # that feeder is lost, and its socket closed
        if self._watch_fd in ready:
            self._lose("has ended")
        if self.feeder is None:
            self._hello()

    @property
    def lends_draft(self) -> bool:
        """Whether the feeder has the draft model that this engine began with."""
        return self.feeder is not None and self.feeder.draft_fingerprint == self._draft != ""

    def send(self, message: p.Message) -> None:
        """To the feeder, if there is one."""
        if self.feeder is not None:
            self._channel.send(message)

    def complain(self, code: str, text: str) -> None:
        """Tell the feeder what it may not say, so many times: a flood of answers would leave no room
        in the socket for what has to be said."""
        self._complaints += 1
        if self._complaints <= _COMPLAINTS:
            self._channel.send(p.Failure(code, text))

    def dying(self) -> bool:
        """Whether the feeder ends within moments: what it lent may be gone before its end shows."""
        return bool(select.select([self._watch_fd], [], [], DYING_S)[0])

    def close(self, reason: str) -> None:
        if self.feeder is not None:
            self.send(p.Goodbye(reason))
            # LINGER is 0: give the goodbye a moment to leave. If it does not, our end says it.
            time.sleep(0.02)
        self._shut()

    # The socket --------------------------------------------------------------------------------

    def _open(self) -> None:
        """A socket for the next feeder: a new one, so that nothing meant for the last reaches it."""
        self._channel = Client(self._directory / "feeder.sock")
        self._poller = Poller()
        self._channel.register(self._poller)
        if self._leash_fd is not None:
            self._poller.add(self._leash_fd)
        self._watch_fd = -1
        self._next_hello = 0.0
        self._opened = time.monotonic()
        self._ready = set()

    def _shut(self) -> None:
        self._channel.close()
        if self._watch_fd >= 0:
            os.close(self._watch_fd)
            self._watch_fd = -1

    def _orphaned(self) -> None:
        assert self._leash_fd is not None
        log.error("the launcher is gone")
        self._poller.remove(self._leash_fd)
        self._leash_fd = None
        os.kill(os.getpid(), signal.SIGTERM)

    # Who is there ------------------------------------------------------------------------------

    def _is_ours(self, message: p.Message | ProtocolError) -> bool:
        """Deals with the message, unless it is about weights."""
        match message:
            case p.Grant() | p.Grants() if self.feeder is not None:  # of all, most are
                return True
            case ProtocolError():
                self.malformed += 1
                if self.malformed <= _MALFORMED_SHOWN:
                    log.warning("refused a message: %s", message)
                self.complain("protocol", str(message))
            case p.Welcome() if self.feeder is None:
                self._welcome(message)
            case p.Failure(code, text):
                self._refused(code, text)
            case p.Goodbye(reason) if self.feeder is not None:
                self._lose(f"says goodbye ({reason})")
            case _ if self.feeder is not None:
                return True
            case _:
                self.ignored += 1
        return False

    def _hello(self) -> None:
        now = time.monotonic()
        if now < self._next_hello:
            return
        self._next_hello = now + HELLO_INTERVAL_S
        pid = Lock.holder(self._directory / "feeder.lock")
        if pid is not None and pid == self._refused_pid:
            return
        if self._channel.send(p.Hello("engine", os.getpid(), self._fingerprint, _FORMATS)):
            self._next_hello = now + HELLO_REPEAT_S
            return
        if now - self._opened < QUIET_S:
            return  # a feeder that is there is reached within moments
        name = self._directory.name
        if pid is not None:
            self._say(f"waiting for feeder {name!r}, pid {pid}, to load its store")
        else:
            command = f"python -m feeder --name {name} --model STORE"
            self._say(f"waiting for a feeder called {name!r}; start one with: {command}")

    def _say(self, text: str) -> None:
        """Once; under a launcher, which starts the feeder itself, not at all."""
        if text != self._said:
            self._said = text
            log.log(logging.DEBUG if self._leash_fd is not None else logging.INFO, text)

    def _welcome(self, welcome: p.Welcome) -> None:
        if self._fingerprint not in ("", welcome.fingerprint):
            self._channel.send(p.Goodbye("another store"))
            text = f"it has store {welcome.fingerprint}, this engine works with {self._fingerprint}"
            self._refused("store", text, welcome.pid)
            return
        kind = (welcome.dtype, welcome.device)
        if self._kind not in (None, kind):
            self._channel.send(p.Goodbye("another dtype or device"))
            text = f"it fills slots of {' on '.join(kind)}, this engine reads {' on '.join(self._kind or ())}"
            self._refused("store", text, welcome.pid)
            return
        try:
            self._watch_fd = watch(welcome.pid)
        except PeerError:
            return  # gone already; the next one is waited for
        self._poller.add(self._watch_fd)
        if self._fingerprint:
            log.info("feeder %d takes over; going on", welcome.pid)
            self.absent_s += time.monotonic() - self._lost_at
        else:
            self._draft = welcome.draft_fingerprint
        self._fingerprint, self._kind = welcome.fingerprint, kind
        self.feeder = welcome
        self._found()

    def _refused(self, code: str, text: str, pid: int = 0) -> None:
        if code == "busy":
            raise PeerError(text)
        if code in ("store", "formats"):
            self._refused_pid = pid or Lock.holder(self._directory / "feeder.lock") or 0
            log.error("refused feeder %d: %s; waiting for another", self._refused_pid, text)
            return
        log.warning("the feeder reports %s: %s", code, text)

    def _lose(self, how: str) -> None:
        assert self.feeder is not None
        log.warning("feeder %d %s; waiting for another", self.feeder.pid, how)
        self._said = ""
        self.lost_feeders += 1
        self._lost_at = time.monotonic()
        self.feeder = None
        self._lost()
        channel, watch_fd = self._channel, self._watch_fd
        self._open()  # first: a signal may end this thread amid it, and the other one still looks in
        channel.close()
        if watch_fd >= 0:
            os.close(watch_fd)
