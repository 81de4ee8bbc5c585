"""Figures for Prometheus: what the server has done, how the weights came, what the feeder says."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import WeightClient
from engine.generate import Answer
from engine.serve.jobs import Job, Scheduler

PREFIX = "weight_feeder_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SLOTS = ("filling", "ready", "in_use", "revoked")


class Meters:
    """Counts what happens. Told by the scheduler's thread of tokens, by the server's of replies."""

    def __init__(self, client: WeightClient) -> None:
        self._client = client
        self.registry = CollectorRegistry()
        self._stall_s = 0.0

        def name(text: str) -> str:
            return PREFIX + text

        registry = self.registry
        self.replies = Counter(
            name("replies"), "Replies, by path and status", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            name("prompt_tokens"), "Tokens of prompts that were answered", registry=registry
        )
        self._tokens = Counter(
            name("generated_tokens"), "Tokens that were generated", registry=registry
        )
        self._cancelled = Counter(
            name("abandoned_requests"), "Requests whose clients went away", registry=registry
        )
        self._first = Histogram(
            name("time_to_first_token_seconds"), "From the request on, its wait in the queue included",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._between = Histogram(
            name("time_between_tokens_seconds"),
            "Of one answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self._busy = Counter(
            name("generation_seconds"), "Time that was spent on answers", registry=registry
        )
        self._stall = Gauge(
            name("stall_share"), "Share of the last answer's time that it waited for weights",
            registry=registry,
        )  # fmt: skip
        self._rate = Gauge(
            name("tokens_per_second"), "Of the last answer, its first token included",
            registry=registry,
        )  # fmt: skip

    def watch(self, scheduler: Scheduler) -> None:
        """Have its queue, the client and the feeder among the figures from now on."""
        self.registry.register(_Now(scheduler, self._client))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    @property
    def tokens(self) -> int:
        """How many were generated."""
        return int(self.registry.get_sample_value(f"{PREFIX}generated_tokens_total") or 0)

    def answers(self) -> tuple[int, int]:
        """How many requests for an answer were begun to be answered, and how many refused."""
        good = bad = 0
        for metric in self.replies.collect():
            for sample in metric.samples:
                asks = sample.labels.get("path", "").endswith("completions")
                if asks and sample.name.endswith("_total"):
                    good += int(sample.value) * (sample.labels["status"] < "400")
                    bad += int(sample.value) * (sample.labels["status"] >= "400")
        return good, bad

    def begin(self, job: Job) -> None:
        self._stall_s = self._client.stats.stall_s

    def token(self, job: Job, first: bool) -> None:
        self._tokens.inc()
        if first:
            self._first.observe(time.perf_counter() - job.asked)

    def done(self, job: Job, answer: Answer) -> None:
        if job.cancelled:
            self._cancelled.inc()
        else:
            self.prompt_tokens.inc(len(job.prompt))
        for before, after in zip(answer.times_s, answer.times_s[1:], strict=False):
            self._between.observe(after - before)
        if answer.seconds > 0:
            self._busy.inc(answer.seconds)
            stalled = self._client.stats.stall_s - self._stall_s
            self._stall.set(min(1.0, stalled / answer.seconds))
            self._rate.set(len(answer.ids) / answer.seconds)


class _Now(Collector):
    """What is read at the moment of the question, without waiting for anybody."""

    def __init__(self, scheduler: Scheduler, client: WeightClient) -> None:
        self._scheduler, self._client = scheduler, client

    def describe(self) -> list[Metric]:
        return []  # so that registering it does not collect

    def collect(self) -> Iterator[Metric]:
        client, scheduler = self._client, self._scheduler
        said = client.glance()
        yield _gauge("queue_length", "Requests that wait", scheduler.waiting)
        yield _gauge("running_requests", "Requests that are being answered", scheduler.running)
        yield _gauge("feeder_up", "Whether a feeder is there", int(client.has_feeder))
        yield _counter("weight_uses", "Uses of weights", client.stats.uses)
        yield _counter("stalls", "Waits for a weight", client.stats.waits)
        yield _counter("stall_seconds", "Time spent waiting for weights", client.stats.stall_s)
        yield _counter("lost_feeders", "Feeders that went", client.lost_feeders)
        memory = GaugeMetricFamily(
            PREFIX + "device_memory_peak_bytes", "The most that was allocated", labels=["process"]
        )
        memory.add_metric(["engine"], client.peak_bytes())
        if not said:
            yield memory
            return

        def figure(name: str) -> float:
            value = said.get(name, 0)
            return float(value) if isinstance(value, int | float) else 0.0

        memory.add_metric(["feeder"], figure("peak_bytes"))
        yield memory
        slots = GaugeMetricFamily(PREFIX + "slots", "Slots by their state", labels=["state"])
        for state in _SLOTS:
            slots.add_metric([state], figure(f"slots_{state}"))
        yield slots
        yield _gauge("slots_standing", "Slots whose weight stays", figure("standing"))
        yield _gauge("arena_bytes", "Device memory of all slots", figure("arena_bytes"))
        yield _gauge("hit_rate", "Of the last pass: weights found in slots", figure("hit_rate"))
        link = figure("link_bytes_per_s")
        yield _gauge("link_bytes_per_second", "Over the link in the last second", link)
        yield _counter("streamed_bytes", "What has crossed the link", client.streamed_bytes)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value=value)
