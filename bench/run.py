"""Runs the parts that were asked for, in an order in which each leaves the device to the next."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.baselines import baseline, descends_fields, offload_fields
from bench.ceilings import ceilings
from bench.fed import Fed
from bench.plot import plot
from bench.record import Results, circumstances, device_name
from bench.report import say
from bench.settings import Setting, sweep_settings, ttft_settings
from bench.source import Source
from bench.sweep import Effort, sweep, sweep_fields
from bench.ttft import ttft, ttft_fields
from common.errors import WeightFeederError
from common.log import log
from common.memory import Memory, memory_for
from common.process import raise_on_termination
from feeder.strategies.registry import make_strategy

MEASURED = {"ceilings", "sweep", "ttft", "baselines"}
TOKENS, QUICK_TOKENS = 10, 3
PROMPT_TOKENS, QUICK_PROMPT_TOKENS = (16, 512, 4096), (16, 64)


def run(arguments: argparse.Namespace, argv: list[str]) -> None:
    """What the flags ask for. Raises WeightFeederError."""
    raise_on_termination()
    for strategy in arguments.strategies:
        make_strategy(strategy)
    results = Results(Path(arguments.output) if arguments.output else None)
    parts = set(MEASURED) if "all" in arguments.parts else MEASURED & set(arguments.parts)
    if parts:
        memory = memory_for(arguments.device)
        wants_large = memory.device.type == "cuda" and not arguments.quick
        with Source(arguments.store, arguments.shape, wants_large) as source:
            _Bench(arguments, argv, results, source, memory).measure(parts)
    if arguments.plot:
        _plot(results, Path(arguments.plot), needed="plot" in arguments.parts)
    if parts and not arguments.output:
        sys.stdout.write(results.as_json())


class _Bench:
    def __init__(
        self,
        arguments: argparse.Namespace,
        argv: list[str],
        results: Results,
        source: Source,
        memory: Memory,
    ) -> None:
        self._arguments, self._results, self._source = arguments, results, source
        self._argv, self._memory, self._device = argv, memory, memory.device
        self._quick = arguments.quick or source.small
        tokens = arguments.tokens or (QUICK_TOKENS if self._quick else TOKENS)
        self._effort = Effort(tokens, arguments.time_limit)

    def measure(self, parts: set[str]) -> None:
        """What of ``parts`` is not there yet."""
        self._begin(with_store=parts != {"ceilings"})
        if "ceilings" in parts:
            self._ceilings()
        if parts & {"sweep", "ttft"}:
            self._feed("sweep" in parts, "ttft" in parts)
        if "baselines" in parts:
            self._baselines()

    def _ceilings(self) -> None:
        """Link, memory, dequantizer. They need no store."""
        if self._missing("ceilings", {}):
            found = ceilings(self._memory)
            self._results.add("ceilings", {}, found)
            say("ceilings", "of this device", found)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _feed(self, with_sweep: bool, with_ttft: bool) -> None:
        """All that needs a feeder and an engine: one of each for each kind of slots."""
        arguments, effort = self._arguments, self._effort
        # Of the longest context: its prompt and its tokens, with some to spare.
        longest = max(arguments.context)
        room = longest and longest + PROMPT_TOKENS[0] + effort.tokens + 8
        for kind in arguments.slots:
            settings = sweep_settings(
                arguments.strategies, arguments.caches, (kind,), arguments.context, self._quick
            )
            settings = [s for s in settings if self._missing("sweep", sweep_fields(s, effort))]
            prompts = [p for p in self._prompts(kind) if self._missing("ttft", ttft_fields(*p))]
            settings, prompts = settings if with_sweep else [], prompts if with_ttft else []
            if not settings and not prompts:
                continue
            with _fed(Fed(self._source.store(), arguments.device, kind, room)) as fed:
                if settings:
                    sweep(fed, settings, effort, self._results)
                if prompts:
                    ttft(fed, prompts, effort, self._results)

    def _baselines(self) -> None:
        arguments, effort = self._arguments, self._effort
        for fields in (
            offload_fields(arguments.baseline_layers, effort),
            descends_fields(arguments.descends_cache, effort),
        ):
            if self._missing("baselines", fields):
                baseline(fields, self._source.store(), self._memory, effort, self._results)

    def _prompts(self, kind: str) -> list[tuple[Setting, int]]:
        arguments = self._arguments
        default = QUICK_PROMPT_TOKENS if self._quick else PROMPT_TOKENS
        settings = ttft_settings((kind,), self._quick)
        if arguments.caches:
            settings = sweep_settings(
                arguments.strategies, arguments.caches, (kind,), arguments.context, self._quick
            )
        lengths = arguments.prompt_tokens or default
        return [(setting, length) for setting in settings for length in lengths]

    def _begin(self, with_store: bool) -> None:
        """Results are of this device, and of the store if it plays a part."""
        name = device_name(self._arguments.device)
        facts: dict[str, object] = {}
        if with_store:
            store = self._source.store()
            elements = sum(entry.elements for entry in store.weights)
            itemsize = getattr(torch, store.dtype).itemsize if self._device.type == "cuda" else 4
            facts = {
                "model": self._source.name,
                "weights": len(store.weights),
                "packed_bytes": store.packed_bytes,
                "dequantized_bytes": elements * itemsize,
            }
        identity = self._source.store().fingerprint if with_store else ""
        self._results.begin(circumstances(self._argv, name, identity) | facts)

    def _missing(self, part: str, fields: dict[str, object]) -> bool:
        return not self._results.has(part, fields, self._arguments.again)


@contextmanager
def _fed(fed: Fed) -> Iterator[Fed]:
    with fed:
        yield fed
        del fed.model  # what follows needs its memory
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _plot(results: Results, path: Path, needed: bool) -> None:
    try:
        plot(results, path)
    except WeightFeederError as error:
        if needed:
            raise
        log.warning("no plot: %s", error)
