"""The engine's ledger against a model, with real shared memory for segments."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from common import protocol as p
from common.memory import CpuMemory, Segment
from engine.ledger import Lease, Ledger

SIZE = 4096


def grant_of(weight: int, slot: int = 0, generation: int = 1, **changes: object) -> p.Grant:
    grant = p.Grant(weight, slot, generation, 0, 512 * slot, 512, "dequantized", False, 0)
    return dataclasses.replace(grant, **changes)  # type: ignore[arg-type]


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.add(0, CpuMemory().allocate(SIZE))
    return made


def test_a_lease_is_the_slot_itself(ledger: Ledger) -> None:
    segment = CpuMemory().allocate(SIZE)
    ledger.add(1, segment)
    assert ledger.grant(grant_of(7, slot=3, segment=1, offset_bytes=1024, size_bytes=48))
    lease = ledger.take(7)
    assert lease is not None
    segment.tensor[1024 : 1024 + 48] = torch.arange(24).to(torch.bfloat16).view(torch.uint8)
    weight = lease.weight(torch.bfloat16, (4, 6))
    assert weight.equal(torch.arange(24).view(4, 6).to(torch.bfloat16))
    assert weight.data_ptr() == segment.tensor.data_ptr() + 1024  # no copy
    assert lease.data.numel() == 48
    assert lease.weight(torch.bfloat16, (4, 6)) is weight


def test_an_ordinary_grant_is_good_for_one_use(ledger: Ledger) -> None:
    assert ledger.grant(grant_of(7))
    lease = ledger.take(7)
    assert lease is not None
    assert not ledger.returning(7)
    assert ledger.put(lease)
    assert ledger.returning(7)
    assert ledger.returned(lease)
    assert not ledger.returning(7)
    assert ledger.take(7) is None


@pytest.mark.parametrize("standing", [False, True])
@pytest.mark.parametrize("recalled", [False, True])
def test_who_reads_a_weight_may_have_it_again(
    ledger: Ledger, standing: bool, recalled: bool
) -> None:
    """As when the same Linear is evaluated at a breakpoint inside it. The last reader returns it."""
    assert ledger.grant(grant_of(7, standing=standing))
    lease = ledger.take(7)
    assert lease is not None
    if recalled:
        assert ledger.recall(0, 1, ()) is None
    assert ledger.take(7) is lease
    assert ledger.take(7) is lease
    assert not ledger.put(lease)
    assert not ledger.put(lease)
    last = ledger.put(lease)
    assert last == (recalled or not standing)
    assert ledger.returning(7) == last
    if last:
        assert ledger.take(7) is None
        assert ledger.returned(lease)


def test_several_are_taken_together_or_not_at_all(ledger: Ledger) -> None:
    assert ledger.grant(grant_of(7))
    assert ledger.take_all((7, 8)) is None
    assert ledger.grant(grant_of(8, slot=1, standing=True))
    leases = ledger.take_all((7, 8, 7))
    assert leases is not None
    assert [(lease.grant.weight, lease.readers) for lease in leases] == [(7, 2), (8, 1), (7, 2)]
    assert [ledger.put(lease) for lease in leases] == [False, False, True]
    assert ledger.take_all((8,)) == [leases[1]]
    assert ledger.take_all((7, 8)) is None
    assert leases[1].readers == 1
    assert ledger.take_all(()) == []


def test_a_standing_grant_is_good_until_it_is_recalled(ledger: Ledger) -> None:
    assert ledger.grant(grant_of(7, standing=True))
    for _ in range(3):
        lease = ledger.take(7)
        assert lease is not None
        assert not ledger.put(lease)
    first, second = ledger.take(7), ledger.take(7)
    assert first is second is lease
    assert ledger.recall(0, 1, ()) is None  # it is being read
    assert not ledger.put(lease)
    assert ledger.put(lease)
    assert ledger.take(7) is None
    assert ledger.returned(lease)


def test_a_recall_of_what_nobody_uses_returns_it_at_once(ledger: Ledger) -> None:
    for standing in (False, True):
        assert ledger.grant(grant_of(7, generation=1 + standing, standing=standing))
        lease = ledger.recall(0, 1 + standing, ())
        assert lease is not None
        assert ledger.take(7) is None
        assert ledger.recall(0, 1 + standing, ()) is None  # twice asked, once returned
        assert ledger.returned(lease)


@pytest.mark.parametrize("standing", [False, True])
def test_a_recall_leaves_it_to_the_one_who_waits_for_it(ledger: Ledger, standing: bool) -> None:
    assert ledger.grant(grant_of(7, standing=standing))
    assert ledger.recall(0, 1, (7,)) is None
    lease = ledger.take(7)
    assert lease is not None
    assert ledger.put(lease)
    assert ledger.take(7) is None


@pytest.mark.parametrize(("slot", "generation"), [(0, 0), (0, 2), (1, 1), (p.MAX_INT, 1)])
def test_a_stale_recall_changes_nothing(ledger: Ledger, slot: int, generation: int) -> None:
    assert ledger.grant(grant_of(7))
    assert ledger.recall(slot, generation, ()) is None
    lease = ledger.take(7)
    assert lease is not None and not lease.recalled


@pytest.mark.parametrize(
    "changes",
    [
        {"segment": 1},
        {"segment": p.MAX_INT},
        {"offset_bytes": SIZE},
        {"offset_bytes": SIZE - 511},
        {"offset_bytes": 0, "size_bytes": SIZE + 1},
        {"offset_bytes": p.MAX_INT, "size_bytes": p.MAX_INT},
        {"slot": 1},  # which holds another weight
        {"weight": 7},  # which is in another slot
    ],
)
def test_a_grant_that_cannot_be_is_refused(ledger: Ledger, changes: dict[str, int]) -> None:
    assert ledger.grant(grant_of(7, slot=1))
    good = grant_of(8, slot=2, generation=2)
    assert not ledger.grant(dataclasses.replace(good, **changes))
    assert ledger.take(8) is None
    assert ledger.take(7) is not None
    assert ledger.grant(good)


def test_a_grant_that_is_replayed_is_refused(ledger: Ledger) -> None:
    for generation in (5, 6):
        assert ledger.grant(grant_of(7, generation=generation))
        lease = ledger.take(7)
        assert lease is not None and ledger.put(lease) and ledger.returned(lease)
        for old in range(generation + 1):
            assert not ledger.grant(grant_of(7, generation=old))
    assert ledger.take(7) is None


def test_the_next_feeder_may_count_as_it_likes(ledger: Ledger) -> None:
    assert ledger.grant(grant_of(7, generation=900))
    ledger.lose()
    assert ledger.take(7) is None
    assert ledger.expects(0)
    ledger.add(0, CpuMemory().allocate(SIZE))
    assert ledger.grant(grant_of(7, generation=2))


def test_segments_come_once() -> None:
    ledger = Ledger()
    for number in (0, 1, 5):
        assert ledger.expects(number)
        ledger.add(number, CpuMemory().allocate(SIZE))
        assert not any(ledger.expects(old) for old in range(number + 1))
    ledger.retire(5)
    ledger.unmap_idle()
    assert not ledger.expects(5)


def test_what_a_dead_feeder_retired_is_not_reported_to_the_next(ledger: Ledger) -> None:
    """Both count their segments from 0: the next one would take its own for unmapped."""
    assert ledger.grant(grant_of(7))
    lease = ledger.take(7)
    assert lease is not None
    ledger.retire(0)
    assert ledger.unmap_idle() == []  # it is being read
    assert ledger.put(lease)
    assert ledger.lose() == []  # its kernels run, and it comes back by itself
    ledger.add(0, CpuMemory().allocate(SIZE))
    assert not ledger.returned(lease)
    assert ledger.unmap_idle() == []
    assert lease.mapping.segment.tensor.numel() == 0


@dataclass
class Expected:
    """What the model knows of one lease."""

    grant: p.Grant
    segment: Segment
    feeder: int
    readers: int = 0
    recalled: bool = False
    used: bool = False
    lease: Lease | None = None
    returning: bool = False


class Machine(RuleBasedStateMachine):
    """Feeders that come and go, grants, uses and recalls in any order."""

    @initialize()
    def begin(self) -> None:
        self.memory = CpuMemory()
        self.ledger = Ledger()
        self.feeder = 0
        self.mapped: dict[int, Segment] = {}
        self.going: list[tuple[int, int, Segment]] = []  # (feeder, number, segment)
        self.held: list[Expected] = []  # not returned
        self.latest: dict[int, Expected] = {}  # by weight: the last that was taken of this feeder's
        self.next_segment = 0
        self.generation = 0

    # The feeder ------------------------------------------------------------------------------------

    @rule()
    def export(self) -> None:
        assert self.ledger.expects(self.next_segment)
        segment = self.mapped[self.next_segment] = self.memory.allocate(SIZE)
        segment.tensor.fill_(len(self.held) + 1)
        self.ledger.add(self.next_segment, segment)
        self.next_segment += 1

    def of_this_feeder(self) -> list[Expected]:
        return [held for held in self.held if held.feeder == self.feeder]

    @precondition(lambda self: self.mapped)
    @rule(data=st.data(), standing=st.booleans())
    def grant(self, data: st.DataObject, standing: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.mapped)))
        slot, weight = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
        self.generation += 1
        grant = grant_of(weight, slot, self.generation, segment=number, standing=standing)
        ours = self.of_this_feeder()
        clash = any(
            h.grant.slot == slot or (self.offered(h) and h.grant.weight == weight) for h in ours
        )
        assert self.ledger.grant(grant) == (not clash)
        if not clash:
            self.held.append(Expected(grant, self.mapped[number], self.feeder))

    @staticmethod
    def offered(held: Expected) -> bool:
        if held.returning:
            return False
        return not held.recalled and (held.grant.standing or not held.used)

    @rule(data=st.data(), stale=st.booleans(), wait=st.booleans())
    def recall(self, data: st.DataObject, stale: bool, wait: bool) -> None:
        ours = self.of_this_feeder()
        if not ours:
            assert self.ledger.recall(0, self.generation, ()) is None
            return
        held = data.draw(st.sampled_from(ours))
        generation = held.grant.generation - stale
        found = self.ledger.recall(held.grant.slot, generation, ())
        if stale or held.readers or held.returning:
            assert found is None
        else:
            assert found is not None and found.grant == held.grant
            held.lease, held.returning = found, True
        held.recalled = held.recalled or not stale

    @precondition(lambda self: self.mapped)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.mapped)))
        self.ledger.retire(number)
        self.going.append((self.feeder, number, self.mapped.pop(number)))

    @rule()
    def lose(self) -> None:
        idle = self.ledger.lose()
        expected = [h for h in self.of_this_feeder() if not h.readers and not h.returning]
        assert [lease.grant for lease in idle] == [held.grant for held in expected]
        for held, lease in zip(expected, idle, strict=True):
            held.lease, held.returning = lease, True
        for held in self.held:
            held.recalled = True
        self.going.extend((self.feeder, number, s) for number, s in self.mapped.items())
        self.mapped.clear()
        self.latest.clear()
        self.feeder += 1
        self.next_segment = self.generation = 0

    # The engine ------------------------------------------------------------------------------------

    @rule(weight=st.integers(0, 4))
    def take(self, weight: int) -> None:
        lease = self.ledger.take(weight)
        possible = [
            h for h in self.of_this_feeder() if h.grant.weight == weight and self.offered(h)
        ]
        read = self.latest.get(weight)
        if not possible and read is not None and read.readers:
            possible = [read]
        if not possible:
            assert lease is None
            return
        (held,) = possible
        self.latest[weight] = held
        assert lease is not None and lease.grant == held.grant
        held.lease, held.used = lease, True
        held.readers += 1

    @precondition(lambda self: any(h.readers for h in self.held))
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([h for h in self.held if h.readers]))
        assert held.lease is not None
        held.readers -= 1
        last = not held.readers and (held.recalled or not held.grant.standing)
        assert self.ledger.put(held.lease) == last
        held.returning = last

    @precondition(lambda self: any(h.returning for h in self.held))
    @rule(data=st.data())
    def returned(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from([h for h in self.held if h.returning]))
        assert held.lease is not None
        assert self.ledger.returned(held.lease) == (held.feeder == self.feeder)
        self.held.remove(held)

    @rule()
    def unmap(self) -> None:
        used = {id(held.segment) for held in self.held}
        free = [entry for entry in self.going if id(entry[2]) not in used]
        told = [number for feeder, number, _ in free if feeder == self.feeder]
        assert self.ledger.unmap_idle() == told
        for entry in free:
            assert entry[2].tensor.numel() == 0, "not unmapped"
            self.going.remove(entry)

    @invariant()
    def nothing_that_may_be_read_is_unmapped(self) -> None:
        for segment in [*(held.segment for held in self.held), *self.mapped.values()]:
            assert segment.tensor.numel() == SIZE
        for weight in range(5):
            ours = [h for h in self.of_this_feeder() if h.grant.weight == weight]
            assert self.ledger.returning(weight) == any(h.returning for h in ours)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
