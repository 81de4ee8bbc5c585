"""A flood of messages that are none, or that were true once, on the socket of either process."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack
import pytest
import zmq

from common import protocol as p
from common.process import remove_run_directory
from common.store import Store
from tests import lives
from tests.processes import Room, until

pytestmark = pytest.mark.usefixtures("device_as_before")

FLOOD = 100_000
GROWTH_BYTES = 8 << 20
OVERSIZED_BYTES = p.MAX_MESSAGE_BYTES + 1

GENUINE: list[p.Message] = [
    p.Hello("engine", 1, "", "dequantized"), p.Hello("nobody", 1, "", ""),
    p.Plan((3, 1, 2)), p.Need(1), p.Release((0, 1), (1, 1)), p.Retired(0), p.Goodbye("bye"),
    p.Status({"uses": 1}), p.Export(9, "shm", 4096, b"/proc/self/exe", False, 0), p.Retire(3),
    p.Grant(0, 0, 1, 0, 0, 512, "dequantized", True, 0), p.Revoke(0, 1), p.Done("well"),
    p.Grants((0, 1), (0, 1), (1, 1), 0, (0, 512), (512, 512), "dequantized", False, (0, 0)),
]  # fmt: skip


def malformed(generator: random.Random) -> list[bytes]:
    """The frames of one message that nobody may obey: usually one frame."""
    whole = p.encode(generator.choice(GENUINE))
    fields = msgpack.unpackb(whole)
    match generator.randrange(12):
        case 0:
            return [generator.randbytes(generator.randrange(200))]
        case 1:
            return [whole[: generator.randrange(len(whole))]]
        case 2:
            return [whole + generator.randbytes(1 + generator.randrange(9))]
        case 3:
            return [
                msgpack.packb(
                    fields | {"v": generator.choice([0, p.VERSION + 1, "1", None, True, 1.0])}
                )
            ]
        case 4:
            return [msgpack.packb(fields | {"t": generator.choice(["", "exec", 7, None, [1]])})]
        case 5:
            return [msgpack.packb(fields | {generator.choice(["x", 1, b"v", ""]): 1})]
        case 6:
            name = generator.choice(list(fields))
            value = generator.choice([-1, 1 << 63, 1.5, None, "x" * 5000, [[]], {"a": []}, b"\xff"])
            return [msgpack.packb(fields | {name: value, "pid": value})]
        case 7:
            return [generator.choice([b"\x91", b"\x81\xa1a"]) * generator.randrange(1, 3000)]
        case 8:  # lengths that the rest does not have
            start = generator.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"])
            return [start + b"\xff\xff\xff\xfe" + generator.randbytes(20)]
        case 9:
            return [b"\xc7\x04\x01abcd", b"\xd6\xff\0\0\0\0"][: generator.randrange(1, 3)]
        case 10:
            return [] if generator.random() < 0.1 else [b"", whole]
        case _:  # a field twice
            version = bytes([p.VERSION])
            return [b"\x83\xa1v" + version + b"\xa1t\xa4need\xa1v" + version]


class Growth:
    """How much a process's memory grows while something happens to it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.first: int | None = None
        self.last = 0

    def look(self) -> None:
        """Once it has met all that may come, the buffers that it keeps are there."""
        self.last = lives.resident_bytes(self._pid)
        if self.first is None:
            self.first = self.last

    def check(self) -> None:
        assert self.first is not None
        assert self.last - self.first < GROWTH_BYTES, (self.first, self.last)


def test_a_flood_at_the_feeder(room: Room, long_store: Path, long_text: list[str]) -> None:
    """From peers that read the answers and from one that does not; replays with right numbers."""
    generator = random.Random(3)
    total = len(Store.open(long_store).weights)
    feeder = room.feeder(*lives.feeder_flags(long_store, 5, "resident"))
    engine = room.engine(*lives.engine_flags(lives.LONGEST))
    lives.until_generating(engine)
    growth = Growth(feeder.pid)
    context: zmq.Context = zmq.Context()
    endpoint = f"ipc://{room.directory() / 'feeder.sock'}"
    answers: Counter[str] = Counter()

    def connect() -> zmq.Socket:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        return socket

    def read(socket: zmq.Socket) -> None:
        while socket.poll(0):
            answer = p.decode(socket.recv())
            assert isinstance(answer, p.Failure | p.Status), answer
            answers[answer.code if isinstance(answer, p.Failure) else "status"] += 1

    listening, deaf, large = connect(), connect(), connect()
    try:
        for number in range(FLOOD):
            choice = generator.random()
            if 0.97 < choice < 0.99:  # true of some slot, but not from this peer
                slots = tuple(range(5))
                first = generator.choice([0, *range(1, 1 << 32, 1 << 24)])
                replayed: list[p.Message] = [
                    p.Release(slots, tuple(first + slot for slot in slots)),
                    p.Need(generator.randrange(total)), p.Plan(tuple(reversed(range(total)))),
                    p.Retired(0), p.Hello("engine", engine.pid, "", "dequantized"),
                ]  # fmt: skip
                frames = [p.encode(generator.choice(replayed))]
            else:
                frames = malformed(generator)
            if choice > 0.999:
                large.send(generator.randbytes(1000) * (OVERSIZED_BYTES // 1000 + 1))
            elif choice > 0.998:
                large.send(b"\x91" * (p.MAX_MESSAGE_BYTES - 1))
            elif frames:
                (deaf if choice < 0.3 else listening).send_multipart(frames)
            if number % 500 == 0:
                read(listening)
                if engine.popen.poll() is None:
                    survived = number
            if number == FLOOD // 4:
                until(lambda: lives.status(room), lambda: "it answers")  # it has kept up so far
                growth.look()
        until(lambda: lives.status(room)["malformed"] > FLOOD * 0.9, lambda: "all are counted")
        read(listening)
        growth.look()
    finally:
        context.destroy()
    fields = lives.status(room)
    print(f"generating for {survived} messages of {FLOOD}; {answers}")
    assert answers["protocol"] > FLOOD / 2
    assert answers["unknown-peer"] > 100 and answers["busy"] > 10
    assert fields["malformed"] + fields["ignored"] <= FLOOD
    growth.check()
    assert fields["engine_pid"] == engine.pid
    ended = engine.wait()
    assert ended.code == 0 and ended.out.split() == long_text, ended.err
    assert feeder.err.count("refused a message") <= 3  # the log does not grow either
    assert len(feeder.err) < 20_000


class Proxy:
    """Stands between an engine and its feeder, and adds messages that the feeder did not send.

    What the engine answers to those is counted, and kept from the feeder.
    """

    def __init__(self, front: Path, back: Path, seed: int) -> None:
        self._context: zmq.Context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._front.setsockopt(zmq.SNDHWM, 0)
        self._front.bind(f"ipc://{front}")
        self._back = self._context.socket(zmq.DEALER)
        self._back.connect(f"ipc://{back}")
        self._generator = random.Random(seed)
        self._past: list[bytes] = []
        self.added = 0
        self.failures = 0
        self.replayed: Counter[str] = Counter()
        self.to_add = 0  # set by the test
        self.failure: BaseException | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._relay()
        except BaseException as error:
            self.failure = error
        finally:
            self._context.destroy(linger=0)

    def _relay(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        engine = b""
        while not self._ending.is_set():
            ready = dict(poller.poll(1 if self.added < self.to_add else 20))
            if self._front in ready:
                engine, frame = self._front.recv_multipart()
                if isinstance(p.decode(frame), p.Failure):
                    self.failures += 1
                else:
                    self._back.send(frame)
            if self._back in ready:
                frame = self._back.recv()
                self._front.send_multipart([engine, frame])
                if not isinstance(p.decode(frame), p.Goodbye | p.Failure | p.StatusRequest):
                    self._past.append(frame)
            for _ in range(min(40, self.to_add - self.added)):
                self._front.send_multipart([engine, *self._one()])
                self.added += 1

    def _one(self) -> list[bytes]:
        choice = self._generator.random()
        if choice < 0.5:
            # Rather what was said lately, or at the very beginning, than something between.
            first = max(0, len(self._past) - 40) if choice < 0.4 else 0
            frame = self._past[self._generator.randrange(first, len(self._past))]
            self.replayed[type(p.decode(frame)).__name__] += 1
            return [frame]
        if choice < 0.5005:
            return [b"\xa1" * OVERSIZED_BYTES]
        return malformed(self._generator) or [b""]

    def close(self) -> None:
        self._ending.set()
        self._thread.join()


@contextmanager
def proxy(front: Path, back: Path, seed: int) -> Iterator[Proxy]:
    between = Proxy(front, back, seed)
    try:
        yield between
    finally:
        between.close()
        front.unlink()
        remove_run_directory(front.parent)


def test_a_flood_at_the_engine(room: Room, long_store: Path, long_text: list[str]) -> None:
    """Old grants, revokes, exports and welcomes, repeated between the true ones, and garbage."""
    room.feeder(*lives.feeder_flags(long_store, 4))
    front = room.directory("front")
    front.mkdir(mode=0o700)
    back = room.directory() / "feeder.sock"
    with proxy(front / "feeder.sock", back, seed=5) as between:
        engine = room.engine("--name=front", *lives.engine_flags(lives.LONGEST))
        lives.until_generating(engine)
        growth = Growth(engine.pid)
        swaps = iter(["3", "resident 9", "6", "ring 4"])

        def until_added(target: int) -> None:
            between.to_add = target
            engine.until(
                lambda: between.added >= target or between.failure, f"takes {target:,} messages"
            )
            assert between.failure is None, (between.failure, engine.out[-80:], engine.err)

        for number in range(1, 5):
            until_added(number * FLOOD // 5)
            if number == 2:
                growth.look()
            strategy, _, cache = next(swaps).rpartition(" ")
            lives.ask(room, p.Swap(strategy, cache))  # segments to retire, and to replay
        until_added(FLOOD)
        fields: dict = {}

        def counted() -> bool:
            fields.update(lives.status(room))
            refused = fields.get("engine_malformed", 0), fields.get("engine_ignored", 0)
            return min(refused) > FLOOD * 0.3 and sum(refused) > FLOOD * 0.8

        until(counted, lambda: f"refused so far: {fields}")
        growth.look()
        assert engine.popen.poll() is None, "the generation is too short"
        growth.check()
        assert 0 < between.failures <= 100  # it complains, and leaves room for what it has to say
        assert fields["engine_lost_feeders"] == 0
        ended = engine.wait()
        assert between.failure is None, between.failure
    assert ended.code == 0, ended.err
    assert ended.out.split() == long_text
    assert min(between.replayed[name] for name in ("Grant", "Export", "Welcome")) > 10
    assert ended.err.count("refused a message") <= 3
    assert len(ended.err) < 20_000
    assert "Traceback" not in ended.err
