"""Who is in the next pass: requests join and leave between tokens, and every pass serves all that are in.

One that joins brings its whole prompt into a pass that gives the others their next token, so nobody waits
for it longer than that pass takes. First come, first in. Knows no weights and no clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Several
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from common.errors import MemoryShortageError, UsageError, WeightFeederError
from engine.batch.attention import Part
from engine.batch.passes import Passes
from engine.batch.sequence import Chosen, Owner, Read, Sequence, Unread
from engine.cache import make_cache, past, rounded, windows_of
from engine.generate import Stopped
from engine.shortage import shortage

#: Rows of a pass. Longer prompts are split, whoever else is in: who is in would wait for them too long.
MOST_ROWS = 4096
SHORTAGES = (MemoryShortageError, torch.OutOfMemoryError)


class Room(Protocol):
    """Who knows what memory there is."""

    def chunk(self, tokens: int, capacity: int = 0) -> int | None:
        """How many of a prompt's ``tokens`` a pass may take, None for all; slots are made smaller for it.
        ``capacity``: for so many there is a KV cache already."""

    def fits(self, tokens: int, rows: int, sequences: int, piece: tuple[int, int] = (0, 0)) -> bool:
        """Whether a KV cache of ``tokens`` more and a pass of so many rows and sequences find room.
        ``piece``: the rows of the largest piece of a prompt, and the tokens of that prompt."""


class Batch:
    """At most ``most`` sequences at once. One thread, the model's."""

    def __init__(self, model: Any, passes: Passes, room: Room, most: int) -> None:
        self._config, self._device = model.config, model.device
        self._windows = windows_of(model.config)
        self._passes, self._room, self.most = passes, room, most
        self._waiting: deque[Owner | Sequence] = deque()  # Sequences have been in before
        self._running: list[Sequence] = []  # who joined first is first
        self._spare: DynamicCache | None = None  # the memory of who left last, while nobody is in
        self._ahead: tuple[list[Sequence], Unread] | None = None  # launched before it was needed
        self.passes = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def add(self, owner: Owner) -> None:
        """It joins as soon as there is room."""
        self._waiting.append(owner)

    def rest(self) -> None:
        """Nothing is to be done for a while."""
        self._passes.rest()

    def turn(self) -> None:
        """One pass, from which everybody who is in gets a token, or is nearer to the first one."""
        self._drop_unwanted()
        self._admit()
        if not self._running:
            return
        chosen, unread = self._ahead or self._next_tokens()
        self._ahead = None
        self._look_ahead(chosen)
        for sequence, found in zip(chosen, unread.read(), strict=True):
            self._put(sequence, found)

    def _next_tokens(self) -> tuple[list[Sequence], Unread]:
        parts, logits = self._pass()
        passed = zip(self._running, parts, logits, strict=True)
        ready = [(sequence, row) for sequence, part, row in passed if sequence.passed(part)]
        del parts, passed  # they hold the caches of those that may have to leave now
        chosen, found = [], []
        for sequence, row in ready:
            token = self._choose(sequence, row)
            if token is not None:
                chosen.append(sequence)
                found.append(token)
        return chosen, Unread(found)

    def _look_ahead(self, chosen: list[Sequence]) -> None:
        """Launch one token more before the last has been read, where that waits for no weight: so that a
        GPU does not wait for the host. If the text ends there, it was for nothing."""
        if len(chosen) != 1 or self._waiting or not self._passes.graphed:
            return
        (sequence,) = chosen
        if self._running != [sequence] or not sequence.may_go_on:
            return
        assert sequence.cache is not None
        try:
            logits = self._passes.ahead(sequence.newest, sequence.cache)
            found = self._passes.restfully(lambda: sequence.choose(logits))
        except SHORTAGES:
            return  # the pass that is made instead will say so
        sequence.advanced()
        self.passes += 1
        self._ahead = [sequence], Unread([found])

    # Joining and leaving -----------------------------------------------------------------------

    def _admit(self) -> None:
        rows = sum(sequence.next_rows for sequence in self._running)
        while self._waiting and len(self._running) < self.most:
            sequence = self._next()
            if sequence is None:
                continue
            count = len(sequence.ids)
            chunk = MOST_ROWS
            if not self._running:
                self._passes.rest()  # slots may have to shrink
                kept = 0 if self._spare is None else _kept_tokens(self._spare)
                chunk = min(chunk, self._room.chunk(count, kept) or chunk)
            else:
                total = rows + min(count, chunk)
                # One token of each does not count: else a long prompt could never join others.
                if total - len(self._running) > MOST_ROWS or not self._fits(sequence, chunk, total):
                    return
            self._waiting.popleft()
            sequence.begin(self._cache(count + 1), chunk)
            self._running.append(sequence)
            rows += sequence.next_rows

    def _fits(self, joins: Sequence, chunk: int, rows: int) -> bool:
        count = len(joins.ids)
        # Those that have just joined take their memory in the pass.
        firsts = [past(one.cache)[0] for one in self._running if one.cache is not None]
        kept = sum(layer.capacity for layer in firsts if layer.memory is None)
        pieces = [one.piece for one in self._running]
        pieces.append((chunk, count) if count > chunk else (0, 0))
        largest = max(pieces, key=lambda piece: piece[0] * piece[1])
        return self._room.fits(kept + rounded(count + 1), rows, len(firsts) + 1, largest)

    def _next(self) -> Sequence | None:
        """Who is to join next, still among those that wait; None if that cannot be answered."""
        first = self._waiting[0]
        if isinstance(first, Sequence):
            return first
        try:
            sequence = Sequence(first, first.request(), self._device)
        except UsageError as error:
            failed: WeightFeederError = error
        except SHORTAGES as error:
            failed = _reason(error)
        else:
            self._waiting[0] = sequence
            return sequence
        self._waiting.popleft()
        first.failed(failed)
        return None

    def _cache(self, tokens: int) -> DynamicCache:
        cache, self._spare = self._spare, None
        config = self._config
        if cache is None:
            return make_cache(
                config.num_hidden_layers, tokens, config.max_position_embeddings, self._windows
            )
        for layer in past(cache):
            layer.reset()
            if layer.memory is None or layer.capacity < tokens:
                layer.memory, layer.capacity = None, rounded(tokens)
        return cache

    def _drop_unwanted(self) -> None:
        for sequence in list(self._running):
            if not sequence.owner.wanted:
                self._leave(sequence, whole=False)
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            if _owner(one).wanted:
                self._waiting.append(one)
            elif isinstance(one, Sequence):
                one.owner.done(one.request.conclude(whole=False))

    def _leave(self, sequence: Sequence, whole: bool) -> None:
        self._running.remove(sequence)
        self._ahead = None  # it was the only one, or there is none
        cache = sequence.suspend()
        self._spare = None if self._running else cache  # those who are in may need the memory
        sequence.owner.done(sequence.request.conclude(whole))

    def _fail(self, sequence: Sequence, error: MemoryShortageError) -> None:
        self._running.remove(sequence)
        sequence.suspend()
        sequence.owner.failed(error)

    # The pass ----------------------------------------------------------------------------------

    def _pass(self) -> tuple[list[Part], Several[torch.Tensor]]:
        """Made with fewer, if memory does not suffice for all: who came last waits."""
        while True:
            parts = [sequence.part() for sequence in self._running]
            try:
                logits = self._passes(parts) if parts else []
                self.passes += bool(parts)
                return parts, logits
            except SHORTAGES as error:
                reason = _reason(error)
            # Not in the except clause: until it ends, the traceback holds the tensors of the pass.
            self._make_room(self._running[-1], reason)

    def _make_room(self, sequence: Sequence, reason: MemoryShortageError) -> None:
        """Memory ran out: it leaves, and joins again when there is room. It fails if it is alone."""
        if len(self._running) == 1:
            self._fail(sequence, reason)
            return
        self._running.remove(sequence)
        sequence.suspend()
        self._waiting.appendleft(sequence)

    def _choose(self, sequence: Sequence, logits: torch.Tensor) -> Chosen | None:
        try:
            found: Chosen = self._passes.restfully(lambda: sequence.choose(logits))
            return found
        except SHORTAGES as error:
            reason = _reason(error)
        self._make_room(sequence, reason)
        return None

    def _put(self, sequence: Sequence, found: Read) -> None:
        try:
            sequence.put(found.token, found.measured)
        except Stopped:
            self._leave(sequence, whole=False)
            return
        if found.ended:
            self._leave(sequence, whole=True)


def _owner(one: Owner | Sequence) -> Owner:
    return one.owner if isinstance(one, Sequence) else one


def _reason(error: Exception) -> MemoryShortageError:
    """What to say of it, without the traceback: that holds the tensors of what was tried, and a frame
    that keeps the error would hold itself."""
    if isinstance(error, MemoryShortageError):
        return error.with_traceback(None)
    return shortage(str(error))


def _kept_tokens(cache: DynamicCache) -> int:
    """For how many tokens it has memory."""
    first = past(cache)[0]
    return 0 if first.memory is None else first.capacity
