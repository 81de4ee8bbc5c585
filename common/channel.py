"""Sockets: the only user of zmq. Carries messages, knows nothing of what they mean.

ZeroMQ over a Unix socket in a private directory. A socket belongs to the thread that made it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import zmq

from common.errors import ConfigError, ProtocolError
from common.log import log
from common.protocol import MAX_MESSAGE_BYTES, Message, decode, encode

#: Messages that may wait for a peer that does not read. Grants are bounded by the slots, which are
#: far fewer; only a peer that floods requests and reads no answer meets this.
_HIGH_WATER = 4_000
#: Messages that may wait for us: beyond that a peer that floods has to wait, and no memory is taken.
_BACKLOG = 1_000
#: Messages taken before the loop looks after its other work, so that a flood starves nobody.
_AT_ONCE = 256
#: From a server's last words to its end: a client drops what it has not read when it is disconnected.
_FAREWELL_S = 0.1
_MAX_SOCKET_PATH = 107  # sun_path, less its terminating zero
#: As plain integers: arithmetic on zmq's enums takes as long as a small message.
_READABLE, _NOBLOCK, _MORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)  # else closing with unsent messages waits for ever
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)  # a peer that exceeds it is disconnected
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, _BACKLOG)
    return socket


def _readable(socket: zmq.Socket[bytes]) -> bool:
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _READABLE)


def _endpoint(path: Path) -> str:
    if len(str(path).encode()) > _MAX_SOCKET_PATH:
        raise ConfigError(
            f"socket path {path} is longer than {_MAX_SOCKET_PATH} bytes:"
            " set XDG_RUNTIME_DIR to a shorter directory"
        )
    return f"ipc://{path}"


class Server:
    """The feeder's end: many peers, each known by the identity that ZeroMQ gives it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _socket(self._context, zmq.ROUTER)
        # A send to nobody is to be an error, not silence.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(_endpoint(path))

    def receive(self) -> Iterator[tuple[bytes, Message | ProtocolError]]:
        """What has arrived, some at a time: (peer, message), or (peer, why it was none). Never blocks."""
        # Asked first: an exception for "nothing there" would cost more than most messages.
        for _ in range(_AT_ONCE):
            if not _readable(self._socket):
                return
            frames = self._socket.recv_multipart(_NOBLOCK)
            if len(frames) != 2:
                error = ProtocolError(f"{len(frames) - 1} frames found: expected one")
                yield frames[0], error
                continue
            try:
                yield frames[0], decode(frames[1])
            except ProtocolError as error:
                yield frames[0], error

    def send(self, peer: bytes, message: Message) -> bool:
        """Whether the message was taken: False if the peer is gone or reads nothing."""
        try:
            data = encode(message)
            self._socket.send(peer, _MORE | _NOBLOCK)
            self._socket.send(data, _NOBLOCK)
        except zmq.ZMQError:
            return False
        except ProtocolError as error:  # what a peer or a user gave us does not fit a message
            log.warning("not sent: %s", error)
            return False
        return True

    def register(self, poller: Poller) -> None:
        poller.add(self._socket)

    def close(self) -> None:
        time.sleep(_FAREWELL_S)
        self._socket.close()
        self._context.term()
        self._path.unlink(missing_ok=True)


class Client:
    """The other end: one peer, the server at ``path``, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _socket(self._context, zmq.DEALER)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        # Disconnecting would lose what has been granted: ``decode`` refuses what is too large.
        self._socket.setsockopt(zmq.MAXMSGSIZE, 64 * MAX_MESSAGE_BYTES)
        # Only a living connection takes messages: none is kept for whoever binds the path next.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.connect(_endpoint(path))

    def receive(self) -> Iterator[Message | ProtocolError]:
        """What has arrived, some at a time. Never blocks."""
        # Asked first: an exception for "nothing there" would cost more than most messages.
        for _ in range(_AT_ONCE):
            if not _readable(self._socket):
                return
            frames = self._socket.recv_multipart(_NOBLOCK)
            if len(frames) != 1:
                yield ProtocolError(f"{len(frames)} frames found: expected one")
                continue
            try:
                yield decode(frames[0])
            except ProtocolError as error:
                yield error

    def send(self, message: Message) -> bool:
        """Whether a connected server took the message."""
        try:
            self._socket.send(encode(message), _NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def register(self, poller: Poller) -> None:
        poller.add(self._socket)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class Poller:
    """Waits for sockets and file descriptors."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()

    def add(self, source: zmq.Socket[bytes] | int) -> None:
        self._poller.register(source, zmq.POLLIN)

    def remove(self, source: int) -> None:
        self._poller.unregister(source)

    def wait(self, timeout_s: float | None = None) -> set[int]:
        """Blocks until something is there; the descriptors (not the sockets) that are readable."""
        timeout_ms = None if timeout_s is None else max(0, int(timeout_s * 1000))
        return {source for source, _ in self._poller.poll(timeout_ms) if isinstance(source, int)}
