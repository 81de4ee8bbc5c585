"""What both processes take of the device beside the slots, part by part. No allocation.

The slots get what is left: of what is free now, and of ``--vram``. The engine's parts are figured out
before it is there, from the model's config; how it is bounded to them is in the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.checkpoint import EMBEDDING
from common.config import format_bytes
from common.footprint import (
    PASS_STEP,
    PLANNED_CONTEXT,
    WORKSPACE_BYTES,
    activation_bytes,
    kept_tokens,
    kv_bytes,
    model_context,
    scratch_bytes,
)
from common.store import Store

#: A process's CUDA context with the kernels that it loads and its CUDA graphs.
CONTEXT_BYTES = 640 << 20
#: What is left free of a device that others may use too.
MARGIN_BYTES = 256 << 20
LONGEST_PASS = 4096  # tokens of one pass that memory is kept for; longer prompts are split
#: Of what grows and shrinks in torch's allocator an eighth may lie in pieces that are too small.
SLACK_SHARE = 8


@dataclass(frozen=True)
class Limits:
    """What the user bounds beside ``--cache``: ``--vram`` (None: what is free), ``--context`` and
    ``--batch``."""

    vram_bytes: int | None = None
    context: int | None = None
    batch: int = 1


@dataclass(frozen=True)
class DraftPart:
    """A draft model: ``slot_bytes`` are what its slots take, ``packed`` whether any of them is."""

    store: Store
    slot_bytes: int
    packed: bool


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device. ``tokens``: of the KV cache; ``pass_tokens``: of the longest pass. A draft
    model has slots of its own, which are no part of the cache, and a KV cache and residents."""

    contexts: int
    staging: int
    residents: int
    kv_cache: int
    activations: int
    scratch: int
    slack: int
    tokens: int
    pass_tokens: int
    draft_slots: int = 0
    draft_engine: int = 0

    @property
    def engine_bytes(self) -> int:
        """What the engine allocates, its context left out."""
        own = self.residents + self.kv_cache + self.activations + self.scratch + self.slack
        return own + self.draft_engine

    @property
    def total(self) -> int:
        """Everything but the slots, of both processes."""
        return self.contexts + self.staging + self.draft_slots + self.engine_bytes

    def __str__(self) -> str:
        """``contexts 1.07 GB, staging …``, for errors and plans."""
        parts = {
            "contexts": self.contexts,
            "staging": self.staging,
            "embedding, norms and biases": self.residents,
            f"KV cache of {self.tokens:,} tokens": self.kv_cache,
            f"activations of {self.pass_tokens:,} tokens": self.activations,
            "scratch for packed weights": self.scratch,
            "slack": self.slack,
            "the draft model's slots": self.draft_slots,
            "the draft model's KV cache, norms and biases": self.draft_engine,
        }
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


def footprints(
    store: Store,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    staging_bytes: int,
    packed: bool,
    draft: DraftPart | None = None,
) -> Iterator[Footprint]:
    """As it is best, and then with passes of fewer and fewer tokens, for devices that have less.

    ``packed``: whether any slot holds a packed weight.
    """
    scratch = _scratch_bytes(store, dtype) if packed else 0
    tokens = kept_tokens(store.config, limits.context, limits.batch)
    kv_cache = kv_bytes(store.config, tokens, dtype.itemsize)
    longest = min(limits.context or PLANNED_CONTEXT, model_context(store.config), LONGEST_PASS)
    configs, draft_engine, growing = [store.config], 0, kv_cache
    if draft is not None:
        configs.append(draft.store.config)
        draft_kv = kv_bytes(draft.store.config, tokens, dtype.itemsize)
        draft_engine = _resident_bytes(draft.store, dtype, device) + draft_kv
        growing += draft_kv
        scratch += _scratch_bytes(draft.store, dtype) if draft.packed else 0
    while True:
        # The two never compute at once: one takes what the other has let go of.
        activations = max(
            activation_bytes(c, longest, dtype.itemsize, limits.batch) for c in configs
        )
        activations += WORKSPACE_BYTES
        yield Footprint(
            contexts=0 if device.type == "cpu" else 2 * CONTEXT_BYTES,
            staging=staging_bytes,
            residents=_resident_bytes(store, dtype, device),
            kv_cache=kv_cache,
            activations=activations,
            scratch=scratch,
            slack=(growing + activations) // SLACK_SHARE,
            tokens=tokens,
            pass_tokens=longest,
            draft_slots=0 if draft is None else draft.slot_bytes,
            draft_engine=draft_engine,
        )
        if longest <= PASS_STEP:
            return
        longest = max(PASS_STEP, longest // 2)


@dataclass(frozen=True)
class Room:
    """What slots may take beside ``footprint``. ``has``: who bounds it, as a line can say it."""

    footprint: Footprint
    size_bytes: int  # may be negative
    has: str
    _available_bytes: int  # to everything together
    _margin_bytes: int

    def shortage(self, largest_bytes: int, name: str) -> str:
        """One line for a room that does not hold even the largest weight."""
        need = self.footprint.total + self._margin_bytes + largest_bytes
        margin = f", margin {format_bytes(self._margin_bytes)}" if self._margin_bytes else ""
        draftless = ", or no draft model" if self.footprint.draft_slots else ""
        return (
            f"{self.has} {format_bytes(max(0, self._available_bytes))} and a run needs at least"
            f" {format_bytes(need)} ({need:,} bytes): {self.footprint}{margin}, a slot for {name}"
            f" {format_bytes(largest_bytes)}: give it more memory, or a smaller --context{draftless}"
        )


def slot_room(
    footprint: Footprint, limits: Limits, free_bytes: int, engine_runs: bool, given_bytes: int = 0
) -> Room:
    """What both bounds, the device and ``--vram``, leave for slots.

    ``free_bytes``: of the device now, where the feeder's own context and staging and a draft model's
    slots are taken already,
    and the engine's share too, or most of it, if ``engine_runs``. ``given_bytes``: what slots have
    given up to the engine beyond its share.
    """
    total = footprint.total
    coming = 0 if engine_runs else footprint.engine_bytes + footprint.contexts // 2
    device = Room(
        footprint, free_bytes - coming - MARGIN_BYTES, "the device has",
        free_bytes + total - coming, MARGIN_BYTES,
    )  # fmt: skip
    if limits.vram_bytes is None:
        return device
    available = limits.vram_bytes - given_bytes
    asked = Room(footprint, available - total, "--vram gives", available, 0)
    return min(asked, device, key=lambda room: room.size_bytes)


def _scratch_bytes(store: Store, dtype: torch.dtype) -> int:
    largest = max((entry.elements for entry in store.weights), default=0)
    return scratch_bytes(largest, dtype.itemsize)


def _resident_bytes(store: Store, dtype: torch.dtype, device: torch.device) -> int:
    """Of what the engine keeps on the device. A table that is only looked up stays in host memory:
    see engine/embedding.py."""
    looked_up = not store.tied and device.type != "cpu"
    return dtype.itemsize * sum(
        math.prod(entry.shape)
        for entry in store.residents
        if not (looked_up and entry.name == EMBEDDING)
    )
