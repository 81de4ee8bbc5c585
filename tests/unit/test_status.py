"""Who asks a feeder how it is gets an answer, whatever the engine says or does not say."""

from __future__ import annotations

import pytest

from common import protocol as p
from feeder.requests import StatusRequests

OWN: p.Fields = {"pid": 7, "store": "/some/where/" + "x" * 2000, "hit_rate": 0.5}


class Desk:
    """A feeder's status requests, and what leaves it."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, p.Status]] = []
        self.engine_asked = 0
        self.requests = StatusRequests(self.reply, lambda: dict(OWN))

    def reply(self, peer: bytes, message: p.Message) -> None:
        decoded = p.decode(p.encode(message))  # which fails for what cannot be sent
        assert isinstance(decoded, p.Status)
        self.sent.append((peer, decoded))

    def ask(self, peer: bytes) -> None:
        def ask_engine() -> None:
            self.engine_asked += 1

        self.requests.ask(peer, ask_engine)


def test_without_an_engine_the_answer_comes_at_once() -> None:
    desk = Desk()
    desk.requests.ask(b"a", None)
    assert desk.sent == [(b"a", p.Status(OWN))]
    assert desk.requests.patience_s() is None


def test_the_engines_figures_come_with_ours() -> None:
    desk = Desk()
    desk.ask(b"a")
    desk.ask(b"b")
    assert desk.sent == []
    assert desk.engine_asked == 1
    desk.requests.answered({"uses": 3, "stall_s": 0.25})
    answer = p.Status(OWN | {"engine_uses": 3, "engine_stall_s": 0.25})
    assert desk.sent == [(b"a", answer), (b"b", answer)]
    desk.requests.answered({"uses": 4})  # nobody asked
    assert len(desk.sent) == 2


def test_an_engine_that_is_gone_keeps_nobody_waiting() -> None:
    desk = Desk()
    desk.ask(b"a")
    desk.requests.overdue(everyone=False)
    assert desk.sent == []
    patience = desk.requests.patience_s()
    assert patience is not None and 0 < patience < 1
    desk.requests.overdue(everyone=True)
    assert desk.sent == [(b"a", p.Status(OWN))]
    assert desk.requests.patience_s() is None


@pytest.mark.parametrize(
    "fields",
    [
        {"x": "y" * (p.MAX_MESSAGE_BYTES - 100)},
        {"x" * p.MAX_TEXT: 1},
        {str(i): i for i in range(p.MAX_ITEMS)},
        {str(i): "y" * 1000 for i in range(900)},
        {"\U0001f600" * p.MAX_TEXT: "\U0001f600" * p.MAX_TEXT},
    ],
)
def test_an_engine_that_says_too_much_is_cut_short(fields: p.Fields) -> None:
    p.encode(p.Status(fields))  # it may say that
    desk = Desk()
    desk.ask(b"a")
    desk.requests.answered(fields)
    ((_, answer),) = desk.sent
    assert answer.fields.items() >= OWN.items()
    assert len(answer.fields) > len(OWN)
