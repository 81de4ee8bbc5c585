"""Starts a feeder: lock, store, host store, device, slots, and takes them down in reverse order."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from common.config import Cache, batch_of, parse_size
from common.errors import StoreError, UsageError
from common.formats import PACKED
from common.log import log
from common.memory import Memory, memory_for
from common.process import (
    Leash,
    Lock,
    raise_on_termination,
    remove_run_directory,
    run_directory,
)
from common.shared import SHM_DIRECTORY
from common.store import Store
from common.trace import Tracer
from common.vocabulary import shared_vocabulary
from common.wait import Wakeup
from feeder.draft_memory import DraftMemory
from feeder.filler import filler_for
from feeder.footprint import Limits
from feeder.host import HostStore
from feeder.kept import Standby, host_store
from feeder.outlook import Outlook
from feeder.plan_text import room_text
from feeder.recorder import TracingRecorder
from feeder.serve import Feeder
from feeder.strategies.registry import make_strategy
from feeder.traced import ROWS, TracedFeeder


def serve(arguments: argparse.Namespace, leash: Leash) -> None:
    """Serve the store ``arguments.model`` until told to stop; with ``arguments.plan`` only say how
    that would be. Raises WeightFeederError."""
    cache, limits = Cache.parse(arguments.cache), _limits(arguments)
    strategy = make_strategy(arguments.strategy)
    store = _open(arguments.model)
    draft_store = None if arguments.draft is None else _open(arguments.draft)
    if draft_store is not None:
        shared_vocabulary(store.path, draft_store.path)  # raises if there is none
    raise_on_termination()  # until the feeder's loop is there to obey signals
    directory = run_directory(arguments.name)
    with ExitStack() as stack:
        tracer = None
        if arguments.trace is not None:
            tracer = Tracer(arguments.trace, "feeder", ROWS, place=1)
            stack.callback(tracer.close)
        stack.callback(remove_run_directory, directory)
        lock = Lock(directory / "feeder.lock", "feeder")
        stack.callback(lock.release)
        if not arguments.standby:
            lock.acquire()
        memory = memory_for(arguments.device)
        dtype = _dtype(arguments.dtype, store, memory)
        with leash.guarding():  # it takes a while, and nobody listens yet
            standby = None
            if arguments.standby:
                standby = Standby(store, memory, arguments.name)
                stack.callback(standby.close)
                standby.wait(lock)
            host = host_store(store, memory, arguments.name, arguments.keep_store, standby)
        stack.callback(host.close)
        if arguments.keep_store:
            stack.callback(
                log.info, "the host store stays in %s for the next feeder %r; to be rid of it, start"
                " that without --keep-store", SHM_DIRECTORY, arguments.name,
            )  # fmt: skip
        draft = None
        if draft_store is not None:  # before what is left is shared out
            with leash.guarding():
                count = len(store.weights)
                draft = DraftMemory(draft_store, memory, dtype, count, arguments.verify)
        outlook = Outlook(host, memory, dtype)
        wakeup = Wakeup()
        stack.callback(wakeup.close)
        feeder = _feeder(
            tracer, host, memory, wakeup, directory, dtype, cache, strategy, arguments.slots,
            arguments.verify, limits, draft,
        )  # fmt: skip
        stack.callback(feeder.close)
        feeder.link_limit = outlook.link
        outlook.tell(
            feeder.slots, feeder.scheduler, feeder.staging_bytes, arguments.plan, arguments.json
        )
        if arguments.plan:
            return
        capacity = feeder.scheduler.capacity
        log.info(
            "serving %s as %r: strategy %s, %s of slots (%d packed, %s) on %s",
            store.path.name, arguments.name, strategy.name,
            room_text(capacity, feeder.scheduler.sizes), feeder.slots.formats.count(PACKED),
            str(dtype).removeprefix("torch."), memory.identity,
        )  # fmt: skip
        feeder.run(leash)


def _open(where: str) -> Store:
    path = Path(where).resolve()  # an engine may be started elsewhere
    if path.is_file() or (not (path / "store.json").is_file() and (path / "config.json").is_file()):
        raise StoreError(
            f"{path} is a checkpoint, not a store: run python -m feeder.quantize {path} STORE"
            " first, or launch.py, which does"
        )
    return Store.open(path)


def _feeder(
    tracer: Tracer | None, host: HostStore, memory: Memory, wakeup: Wakeup, *arguments: Any
) -> Feeder:
    """``arguments``: the rest of Feeder's."""
    if tracer is None:
        return Feeder(host, memory, filler_for(host, memory, wakeup), wakeup, *arguments)
    recorder = TracingRecorder(tracer, memory, [entry.name for entry in host.store.weights])
    filler = filler_for(host, memory, wakeup, recorder)
    return TracedFeeder(tracer, recorder, host, memory, filler, wakeup, *arguments)


def _limits(arguments: argparse.Namespace) -> Limits:
    if arguments.context is not None and arguments.context < 1:
        raise UsageError(f"--context {arguments.context}: expected a number of tokens, at least 1")
    vram = None if arguments.vram is None else parse_size(arguments.vram)
    return Limits(vram, arguments.context, batch_of(arguments.batch, default=1))


def _dtype(asked: str, store: Store, memory: Memory) -> torch.dtype:
    if asked == "auto":
        asked = store.dtype if memory.device.type == "cuda" else "float32"
    return getattr(torch, asked)
