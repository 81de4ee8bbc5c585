"""Fills: brings weights from the host store into slots. Knows nothing of strategies or peers.

On CUDA everything is queued and nothing waits. A packed slot is filled by one copy. For a dequantized
one the packed bytes are copied into staging memory on one stream and dequantized from there on another.
Staging does not wait for slots: weights that will be filled next are copied ahead, so that the link
stays busy however few slots there are and however late one is given back. A weight of which a packed
copy may stay on the device crosses the link once, and is dequantized from that copy at each fill.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch

from common.blocks import BLOCK, code_bytes, scale_count
from common.dequantize import dequantize_into
from common.errors import InternalError
from common.formats import PACKED
from common.memory import PIN_CHUNK_BYTES, CudaMemory, Memory, Segment
from common.wait import Wakeup, Work, Worker
from feeder.arena import Arena, aligned
from feeder.host import HostStore
from feeder.recorder import SILENT, Recorder

STAGING_BYTES = 256 << 20
#: A weight is staged in pieces of at most so many elements: whole up to the largest matrix of a 32B
#: model, 27648 x 5120, so that each is one copy; lm_head in several.
PIECE_ELEMENTS = 144 << 20


class Filler(ABC):
    """``streamed_bytes``: what has crossed the link so far; ``link_bytes``: what the next fill of each
    weight brings over it, 0 if a copy is on the device; ``far``: the weights for which it is not 0."""

    def __init__(self, host: HostStore, recorder: Recorder = SILENT) -> None:
        self.host = host
        self.streamed_bytes = 0
        self.link_bytes = [entry.packed_bytes for entry in host.store.weights]
        self.far = set(range(len(self.link_bytes)))
        self._recorder = recorder

    @abstractmethod
    def start(self, weight: int, slot_format: str, destination: torch.Tensor) -> Work:
        """Begin to fill ``destination``: the slot's bytes (uint8) if it is packed, else N x K elements
        of the model's dtype, flat. Fills complete in the order they were started."""

    def use_staging(self, on: bool) -> None:
        """Whether dequantized slots are going to be filled. No fill may be on its way."""

    def use_copies(self, weights: Collection[int]) -> None:
        """Of these, and of no others, a packed copy stays on the device once it is there. No fill may
        be on its way, and all slots are dequantized. Only where there is a link to save."""

    @property
    def staging_bytes(self) -> int:
        """How much packed data may lie in staging."""
        return 0

    @property
    def ahead_bytes(self) -> int:
        """How much packed data ``prefetch`` may be asked for; 0: it is of no use now."""
        return 0

    def prefetch(self, weights: Iterable[int]) -> None:
        """These will be filled next, in this order: bring them nearer."""

    def close(self) -> None:
        """Free what the fills used. All fills must be complete."""


class CpuFiller(Filler):
    """Dequantizes on a thread, so that fills are as asynchronous as on a GPU."""

    def __init__(self, host: HostStore, wakeup: Wakeup, recorder: Recorder = SILENT) -> None:
        super().__init__(host, recorder)
        self._worker = Worker("fills", wakeup)
        # One core: the others are the engine's, whose threads wait for each other at every product.
        self._worker.submit(lambda: torch.set_num_threads(1))  # holds for the thread that calls it

    def start(self, weight: int, slot_format: str, destination: torch.Tensor) -> Work:
        host, size = self.host, self.host.store.weights[weight].packed_bytes
        self.streamed_bytes += size

        def copy() -> None:
            with self._recorder.copy(weight, size):
                destination.copy_(host.packed(weight))

        def dequantize() -> None:
            with self._recorder.dequantize(weight, size):
                dequantize_into(host.codes(weight), host.scales(weight), destination)

        return self._worker.submit(copy if slot_format == PACKED else dequantize)

    def close(self) -> None:
        self._worker.close()


_Views = tuple[torch.Tensor, torch.Tensor]  # codes, uint8, and scales, bf16


@dataclass(eq=False)
class _Piece:
    """A run of whole blocks of one weight, on its way through staging; or a copy that stays, whole."""

    first: int
    elements: int
    offset_bytes: int = -1  # in staging, or where the copies are
    stays: bool = False
    arrived: torch.cuda.Event | None = None
    dequantized: Work | None = None


@dataclass(eq=False)
class _Staged:
    """A weight on its way. ``destination``: None while it is only copied ahead."""

    weight: int
    pieces: list[_Piece]
    destination: torch.Tensor | None = None
    to_copy: deque[_Piece] = field(default_factory=deque)
    to_free: deque[_Piece] = field(default_factory=deque)


class _Fill(Work):
    """Complete when every piece has been dequantized. Asking moves all fills on."""

    def __init__(self, filler: CudaFiller, staged: _Staged) -> None:
        self._filler, self._staged = filler, staged

    def complete(self) -> bool:
        self._filler.move_on()
        return not self._staged.to_copy and not self._staged.to_free


class CudaFiller(Filler):
    """Copies on one stream, dequantizes on another."""

    def __init__(self, host: HostStore, memory: CudaMemory, recorder: Recorder = SILENT) -> None:
        super().__init__(host, recorder)
        self._memory = memory
        self._copy = torch.cuda.Stream(memory.device)
        self._compute = torch.cuda.Stream(memory.device)
        # For good: to enter it for every piece would cost more than the launch.
        torch.cuda.set_stream(self._compute)
        self._events: list[torch.cuda.Event] = []
        self._ahead: dict[int, _Staged] = {}  # copied ahead, by weight, in the order of the copies
        self._filling: deque[_Staged] = deque()  # started, in order
        self._pieces = [self._cut(place.elements) for place in host.places]
        self._staging: Segment | None = None
        self._arena: Arena | None = None
        self._copies: Segment | None = None
        self._copy_at: dict[int, int] = {}  # where the copy of a weight is, or will be
        self._copied: dict[int, torch.cuda.Event] = {}  # which are there, and since when
        #: Of copies; to make them takes as long as a launch.
        self._copy_views: dict[int, _Views] = {}

    def use_staging(self, on: bool) -> None:
        if on and self._staging is None:
            largest = max(_piece_bytes(count) for pieces in self._pieces for _, count in pieces)
            size = max(min(STAGING_BYTES, self.host.size_bytes), 2 * aligned(largest))
            self._staging, self._arena = self._memory.allocate(size), Arena(size)
        elif not on and self._staging is not None:
            self._ahead.clear()
            torch.cuda.synchronize(self._memory.device)  # copies ahead may be on their way
            self._staging.close()
            self._staging = self._arena = None

    def use_copies(self, weights: Collection[int]) -> None:
        if self._copies is not None:
            torch.cuda.synchronize(self._memory.device)  # copies ahead may be on their way
            self._copy_views.clear()
            self._copies.close()
            self._copies = None
            for weight in self._copied:
                self.link_bytes[weight] = self.host.store.weights[weight].packed_bytes
            self.far.update(self._copied)
            self._copied.clear()
        self._copy_at.clear()
        size = 0
        for weight in sorted(weights):
            self._copy_at[weight] = size
            size += aligned(self.host.places[weight].size_bytes)
        if size:
            self._copies = self._memory.allocate(size)
        for weight in self._ahead.keys() & self._copy_at.keys():  # no fill will ask for it there
            self._drop(self._ahead.pop(weight))

    @property
    def staging_bytes(self) -> int:
        return self._arena.size_bytes if self._arena else 0

    @property
    def ahead_bytes(self) -> int:
        return self.staging_bytes if self.far else 0

    def start(self, weight: int, slot_format: str, destination: torch.Tensor) -> Work:
        if slot_format == PACKED:
            place = self.host.places[weight]
            with self._recorder.copy(weight, place.size_bytes, self._copy):
                self._transfer(place.offset_bytes, destination.data_ptr(), place.size_bytes)
            self.streamed_bytes += self.host.store.weights[weight].packed_bytes
            return self._memory.mark(self._copy)
        if weight in self._copy_at:
            self._bring(weight)
            staged = self._stage_copy(weight)
        else:
            ahead = self._ahead.pop(weight, None)
            staged = ahead if ahead is not None else self._stage(weight)
        staged.destination = destination
        self._filling.append(staged)
        self.move_on()
        return _Fill(self, staged)

    def prefetch(self, weights: Iterable[int]) -> None:
        if self._arena is None or any(staged.to_copy for staged in self._filling):
            return  # what was started goes first
        wanted = list(weights)
        for weight in wanted:
            if weight in self._copy_at:
                self._bring(weight)
                continue
            if len(self._pieces[weight]) > 1:
                return  # larger than a piece: it would fill staging before its turn
            if weight in self._ahead:
                continue
            staged = self._stage(weight)
            if not self._copy_piece(staged):
                stale = [ahead for ahead in self._ahead if ahead not in wanted]
                for other in stale:
                    self._drop(self._ahead.pop(other))
                if not stale or not self._copy_piece(staged):
                    return
            self._ahead[weight] = staged

    def move_on(self) -> None:
        """Free what was dequantized, copy and dequantize what now finds room. Never waits."""
        for staged in self._filling:
            while staged.to_free and (work := staged.to_free[0].dequantized) and work.complete():
                self._free(staged.to_free.popleft())
            if staged.to_free and not staged.to_copy:
                break  # what was queued behind it need not be asked after
        while self._filling and not (self._filling[0].to_copy or self._filling[0].to_free):
            self._filling.popleft()
        room = True
        for staged in self._filling:
            while room and staged.to_copy:  # in order: the room is for whoever was started first
                room = self._copy_piece(staged) or self._drop_one()
            for piece in staged.to_free:
                if piece.dequantized is None:
                    self._dequantize(staged, piece)

    def close(self) -> None:
        torch.cuda.synchronize(self._memory.device)
        self._copy_views.clear()
        for segment in (self._staging, self._copies):
            if segment is not None:
                segment.close()

    # Pieces ------------------------------------------------------------------------------------

    def _cut(self, elements: int) -> list[tuple[int, int]]:
        """First element and count of each piece."""
        count = -(-elements // PIECE_ELEMENTS)
        step = -(-scale_count(elements) // count) * BLOCK
        return [(first, min(step, elements - first)) for first in range(0, elements, step)]

    def _stage(self, weight: int) -> _Staged:
        pieces = [_Piece(first, elements) for first, elements in self._pieces[weight]]
        return _Staged(weight, pieces, to_copy=deque(pieces))

    def _bring(self, weight: int) -> None:
        """Begin to make the copy that stays, unless it has begun."""
        if weight in self._copied:
            return
        assert self._copies is not None
        place = self.host.places[weight]
        to = self._copies.tensor.data_ptr() + self._copy_at[weight]
        with self._recorder.copy(weight, place.size_bytes, self._copy):
            self._transfer(place.offset_bytes, to, place.size_bytes)
        self._copied[weight] = torch.cuda.Event()
        self._copied[weight].record(self._copy)
        self.streamed_bytes += self.link_bytes[weight]
        self.link_bytes[weight] = 0
        self.far.discard(weight)

    def _stage_copy(self, weight: int) -> _Staged:
        piece = _Piece(
            0, self.host.places[weight].elements, self._copy_at[weight], stays=True,
            arrived=self._copied[weight],
        )  # fmt: skip
        return _Staged(weight, [piece], to_free=deque([piece]))

    def _copy_piece(self, staged: _Staged) -> bool:
        """Begin to copy the next piece, if staging has room."""
        if self._arena is None or self._staging is None:
            raise InternalError("a dequantized slot is to be filled, and there is no staging")
        piece, place = staged.to_copy[0], self.host.places[staged.weight]
        offset = self._arena.allocate(_piece_bytes(piece.elements))
        if offset is None:
            return False
        to = self._staging.tensor.data_ptr() + offset
        with self._recorder.copy(staged.weight, _piece_bytes(piece.elements), self._copy):
            if len(staged.pieces) == 1:
                self._transfer(place.offset_bytes, to, place.size_bytes)
            else:
                codes = place.offset_bytes + piece.first // 2
                self._transfer(codes, to, code_bytes(piece.elements))
                scales = place.offset_bytes + place.scales_at + 2 * (piece.first // BLOCK)
                size = 2 * scale_count(piece.elements)
                self._transfer(scales, to + aligned(code_bytes(piece.elements)), size)
        self.streamed_bytes += code_bytes(piece.elements) + 2 * scale_count(piece.elements)
        piece.offset_bytes = offset
        piece.arrived = self._events.pop() if self._events else torch.cuda.Event()
        piece.arrived.record(self._copy)
        staged.to_free.append(staged.to_copy.popleft())
        return True

    def _dequantize(self, staged: _Staged, piece: _Piece) -> None:
        assert staged.destination is not None and piece.arrived is not None
        views = self._copy_views.get(staged.weight) if piece.stays else None
        if views is None:  # else this stream has waited for the copy before
            self._compute.wait_event(piece.arrived)
            views = self._views(staged, piece)
        out = staged.destination
        if len(staged.pieces) > 1:
            out = out[piece.first :][: piece.elements]
        with self._recorder.dequantize(staged.weight, _piece_bytes(piece.elements), self._compute):
            dequantize_into(*views, out)
        piece.dequantized = self._memory.mark(self._compute)

    def _views(self, staged: _Staged, piece: _Piece) -> _Views:
        """The piece's codes and scales, where it lies now."""
        source = self._copies if piece.stays else self._staging
        assert source is not None
        at = source.tensor[piece.offset_bytes :]
        size = code_bytes(piece.elements)
        scales_at = aligned(size)
        if len(staged.pieces) == 1:
            scales_at = self.host.places[staged.weight].scales_at
        scales = at[scales_at:][: 2 * scale_count(piece.elements)].view(torch.bfloat16)
        views = at[:size], scales
        if piece.stays:
            self._copy_views[staged.weight] = views
        return views

    def _free(self, piece: _Piece) -> None:
        if piece.stays:
            return
        assert self._arena is not None and piece.arrived is not None
        self._arena.free(piece.offset_bytes)
        self._events.append(piece.arrived)

    def _drop_one(self) -> bool:
        """Give up what was copied ahead last, to make room for what was started. The next copy into
        its place is queued behind its own, and nothing else reads it."""
        if not self._ahead:
            return False
        self._drop(self._ahead.popitem()[1])
        return True

    def _drop(self, staged: _Staged) -> None:
        for piece in staged.to_free:
            self._free(piece)

    def _transfer(self, source: int, destination: int, size: int) -> None:
        """Copy from the host store; pieces of memory that were pinned apart are copied apart."""
        memory, start = self._memory, self.host.tensor.data_ptr()
        while size:
            length = min(size, PIN_CHUNK_BYTES - source % PIN_CHUNK_BYTES)
            memory.call(
                memory.driver.cuMemcpyHtoDAsync,
                destination, start + source, length, self._copy.cuda_stream,
            )  # fmt: skip
            source, destination, size = source + length, destination + length, size - length


def _piece_bytes(elements: int) -> int:
    return aligned(code_bytes(elements)) + 2 * scale_count(elements)


def filler_for(
    host: HostStore, memory: Memory, wakeup: Wakeup, recorder: Recorder = SILENT
) -> Filler:
    """The filler that suits the memory's device. ``wakeup``: of the loop that waits for fills;
    ``recorder``: notes copies and dequantizations for a trace."""
    if isinstance(memory, CudaMemory):
        return CudaFiller(host, memory, recorder)
    return CpuFiller(host, wakeup, recorder)
