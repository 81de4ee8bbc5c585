"""Sockets, real ones, in a directory of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from common import protocol as p
from common.channel import Client, Poller, Server
from common.errors import ConfigError, ProtocolError

PATIENCE_S = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.sock"


@pytest.fixture
def server(path: Path) -> Iterator[Server]:
    made = Server(path)
    yield made
    made.close()


@contextmanager
def client_of(path: Path) -> Iterator[Client]:
    client = Client(path)
    try:
        yield client
    finally:
        client.close()


@contextmanager
def raw_peer(path: Path, kind: int = zmq.DEALER) -> Iterator[zmq.Socket[bytes]]:
    """A peer that sends whatever bytes it likes."""
    context = zmq.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(f"ipc://{path}")
    try:
        yield socket
    finally:
        socket.close()
        context.term()


def until(true: Callable[[], Any]) -> Any:
    """The first true answer. Fails if there is none for a long time."""
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := true()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.001)
    return answer


def receive(end: Server | Client, count: int) -> list[Any]:
    """The next ``count`` things that arrive."""
    arrived: list[Any] = []
    until(lambda: arrived.extend(end.receive()) or len(arrived) >= count)  # type: ignore[arg-type]
    assert len(arrived) == count
    return arrived


def test_messages_go_both_ways_in_order(server: Server, path: Path) -> None:
    with client_of(path) as client:
        until(lambda: client.send(p.Need(0)))
        for weight in range(1, 300):
            assert client.send(p.Need(weight))
        arrived = receive(server, 300)
        assert [message for _, message in arrived] == [p.Need(weight) for weight in range(300)]
        (peer,) = {peer for peer, _ in arrived}
        for generation in range(300):
            assert server.send(peer, p.Revoke(1, generation))
        assert receive(client, 300) == [p.Revoke(1, generation) for generation in range(300)]
        assert list(client.receive()) == []
        assert list(server.receive()) == []


def test_each_client_gets_its_own_answers(server: Server, path: Path) -> None:
    with client_of(path) as first, client_of(path) as second:
        until(lambda: first.send(p.Need(1)))
        until(lambda: second.send(p.Need(2)))
        peers = {message.weight: peer for peer, message in receive(server, 2)}
        assert peers[1] != peers[2]
        assert server.send(peers[2], p.Done("second"))
        assert server.send(peers[1], p.Done("first"))
        assert receive(first, 1) == [p.Done("first")]
        assert receive(second, 1) == [p.Done("second")]


def test_a_send_to_nobody_is_known(server: Server, path: Path) -> None:
    assert not server.send(b"nobody", p.Stop())
    with client_of(path) as client:
        until(lambda: client.send(p.Stop()))
        ((peer, _),) = receive(server, 1)
        assert server.send(peer, p.Done(""))
    until(lambda: not server.send(peer, p.Done("")))  # it has left


def test_a_client_without_a_server_sends_nothing(path: Path) -> None:
    """Nor is anything kept for whoever binds the path next."""
    with client_of(path) as client:
        for _ in range(20):
            assert not client.send(p.Stop())
        server = Server(path)
        try:
            until(lambda: client.send(p.Need(1)))
            assert [message for _, message in receive(server, 1)] == [p.Need(1)]
        finally:
            server.close()
        until(lambda: not client.send(p.Need(2)))


def test_a_message_to_a_peer_that_reads_nothing_is_refused_in_the_end(
    server: Server, path: Path
) -> None:
    with client_of(path) as client:
        until(lambda: client.send(p.Stop()))
        ((peer, _),) = receive(server, 1)
        text = p.Done("x" * 4000)
        assert any(not server.send(peer, text) for _ in range(200_000)), "memory grows for ever"
        assert next(iter(client.receive())) == text  # what was taken arrives


GARBAGE = [
    b"",
    b"\xc1",
    b"hello",
    b"\x00" * 1000,
    b"\x91" * 5000,
    p.encode(p.Stop())[:-1],
    p.encode(p.Stop()) + b"\0",
    p.encode(p.Need(5)).replace(b"need", b"knee"),
]


def test_garbage_is_reported_and_survived(server: Server, path: Path) -> None:
    with raw_peer(path) as raw, client_of(path) as client:
        for data in GARBAGE:
            raw.send(data)
        for peer, message in receive(server, len(GARBAGE)):
            assert isinstance(message, ProtocolError)
            assert server.send(peer, p.Failure("protocol", str(message)))
        raw.send(p.encode(p.Need(3)))  # the same peer, in its senses again
        ((_, message),) = receive(server, 1)
        assert message == p.Need(3)
        until(lambda: client.send(p.Need(4)))
        assert receive(server, 1)[0][1] == p.Need(4)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_message_of_several_frames_is_refused(server: Server, path: Path, count: int) -> None:
    with raw_peer(path) as raw:
        raw.send_multipart([p.encode(p.Stop())] * count)
        raw.send(p.encode(p.Need(1)))
        (_, error), (_, message) = receive(server, 2)
        assert isinstance(error, ProtocolError)
        assert str(error) == f"{count} frames found: expected one"
        assert message == p.Need(1)


def test_other_kinds_of_sockets_are_refused(server: Server, path: Path) -> None:
    with raw_peer(path, zmq.REQ) as raw:
        raw.send(p.encode(p.Stop()))  # which puts an empty frame in front
        ((_, error),) = receive(server, 1)
        assert str(error) == "2 frames found: expected one"


def test_a_peer_that_sends_too_much_is_cut_off(server: Server, path: Path) -> None:
    """Its message never reaches our memory; the others notice nothing."""
    with raw_peer(path) as raw, client_of(path) as client:
        raw.send(p.encode(p.Need(2)))
        ((peer, _),) = receive(server, 1)
        assert server.send(peer, p.Done(""))
        raw.send(b"\0" * (p.MAX_MESSAGE_BYTES + 1))
        until(lambda: not server.send(peer, p.Done("")))
        until(lambda: client.send(p.Need(4)))
        assert receive(server, 1)[0][1] == p.Need(4)


def test_the_largest_message_passes(server: Server, path: Path) -> None:
    message = p.Release(tuple(range(60_000)), (3,) * 60_000)
    with client_of(path) as client:
        until(lambda: client.send(message))
        assert receive(server, 1)[0][1] == message


def test_a_client_survives_garbage_too(path: Path) -> None:
    """And keeps the connection: a feeder that is gone would take its grants along."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.bind(f"ipc://{path}")
    try:
        with client_of(path) as client:
            until(lambda: client.send(p.Need(1)))
            peer, _ = router.recv_multipart()
            for data in GARBAGE:
                router.send_multipart([peer, data])
            router.send_multipart([peer, b"\0" * (p.MAX_MESSAGE_BYTES + 1)])
            router.send_multipart([peer, p.encode(p.Stop()), p.encode(p.Stop())])
            router.send_multipart([peer, p.encode(p.Done("still here"))])
            *errors, last = receive(client, len(GARBAGE) + 3)
            assert all(isinstance(error, ProtocolError) for error in errors)
            assert str(errors[-1]) == "2 frames found: expected one"
            assert last == p.Done("still here")
    finally:
        router.close()
        context.term()


def test_what_a_dead_server_left_is_in_nobodys_way(path: Path) -> None:
    for left in (path.touch, lambda: bind_and_forget(path)):
        left()
        assert path.exists()
        server = Server(path)
        try:
            with client_of(path) as client:
                until(lambda client=client: client.send(p.Stop()))
                receive(server, 1)
        finally:
            server.close()
        assert not path.exists()


def bind_and_forget(path: Path) -> None:
    """Leave what a process leaves that was killed while it listened."""
    code = f"import os, zmq; zmq.Context().socket(zmq.ROUTER).bind('ipc://{path}'); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 108)
    for make in (Server, Client):
        with pytest.raises(ConfigError, match="longer than 107 bytes"):
            make(path)


def test_the_poller_wakes_for_messages_and_descriptors(server: Server, path: Path) -> None:
    read, write = os.pipe()
    poller = Poller()
    server.register(poller)
    poller.add(read)
    assert poller.wait(0) == set()
    os.write(write, b"x")
    assert poller.wait() == {read}
    assert poller.wait(5) == {read}  # as long as it is readable
    poller.remove(read)
    with client_of(path) as client:
        until(lambda: client.send(p.Stop()))
        assert poller.wait(PATIENCE_S) == set()  # it is the socket
        assert receive(server, 1)[0][1] == p.Stop()
    os.close(read)
    os.close(write)


def test_closing_with_unsent_messages_does_not_wait(path: Path) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)  # accepts, and reads nothing
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.RCVHWM, 1)
    router.bind(f"ipc://{path}")
    client = Client(path)
    until(lambda: client.send(p.Done("x" * 4000)))
    while client.send(p.Done("x" * 4000)):
        pass
    client.close()  # the test ends: that is what it shows
    router.close()
    context.term()
