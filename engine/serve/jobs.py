"""What is to be generated, who waits for it, and in which order it is done.

The seam between the server and the model: on one side requests become jobs and wait for events, on the
other a scheduler answers jobs. One that batches takes the place of `OneByOne` and changes nothing else.
Knows neither HTTP nor the shape of replies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

from common.errors import MemoryShortageError, UsageError, WeightFeederError
from engine.generate import Answer, Generator, Sampling, Stopped
from engine.pieces import StopText
from engine.shortage import shortage


@dataclass(frozen=True)
class Piece:
    """The text goes on."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The text is complete. ``reason``: stop or length."""

    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no more. ``error``: a UsageError if the request is to blame."""

    error: WeightFeederError


Event = Piece | Ended | Failed


class Job:
    """One answer to be generated. ``tell`` gets its events, in the scheduler's thread; the last is
    Ended or Failed, and there is none if it was cancelled."""

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        stops: tuple[str, ...],
        tell: Callable[[Event], None],
    ) -> None:
        self.prompt, self.sampling, self.stops, self.tell = prompt, sampling, stops, tell
        self.asked = time.perf_counter()
        self.cancelled = False


class Busy(WeightFeederError):
    """As many jobs wait as may."""


class Ending(WeightFeederError):
    """The server ends, and takes or answers no job any more."""


class Watcher(Protocol):
    """Is told, in the scheduler's thread, how jobs go."""

    def begin(self, job: Job) -> None: ...

    def token(self, job: Job, first: bool) -> None: ...

    def done(self, job: Job, answer: Answer) -> None: ...


class Scheduler(Protocol):
    """Answers jobs. ``run`` is for the thread that owns the model, the rest for the server's."""

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    def submit(self, job: Job) -> None:
        """Busy or Ending if it cannot be taken."""

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more. Nothing happens if it is done."""

    def run(self) -> None:
        """Answer jobs until `stop`, or until something goes wrong that concerns them all."""

    def stop(self) -> None:
        """Take no more jobs, and let ``run`` return when it looks for the next."""


class OneByOne:
    """One job after the other, in the order in which they came."""

    def __init__(self, generator: Generator, limit: int, watcher: Watcher) -> None:
        """``limit``: how many may wait."""
        self._generator, self._limit, self._watcher = generator, limit, watcher
        # A queue that a signal's exception may leave at any point; of the set each step is atomic.
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: set[Job] = set()
        self._current: Job | None = None
        self._stopped = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return int(self._current is not None)

    def submit(self, job: Job) -> None:
        if self._stopped:
            raise Ending("the server is ending")
        if self.waiting >= self._limit:
            raise Busy(f"{self.waiting} requests wait already: try again later")
        self._waiting.add(job)
        self._queue.put(job)

    def cancel(self, job: Job) -> None:
        job.cancelled = True
        job.prompt = []  # it stays in the queue, and need not take memory there
        self._waiting.discard(job)

    def stop(self) -> None:
        self._stopped = True
        self._queue.put(None)

    def run(self) -> None:
        try:
            while (job := self._queue.get()) is not None:
                self._current = job
                self._waiting.discard(job)
                prompt = job.prompt
                if not job.cancelled:
                    self._answer(job, prompt)
                self._current = None
        finally:
            self._stopped = True
            left = ([self._current] if self._current else []) + list(self._waiting)
            for job in left:
                job.tell(Failed(Ending("the server has ended before this was answered")))
            self._waiting.clear()

    def _answer(self, job: Job, prompt: list[int]) -> None:
        stop = StopText(job.stops)
        seen = 0

        def token() -> None:
            nonlocal seen
            if job.cancelled:
                raise Stopped
            seen += 1
            self._watcher.token(job, seen == 1)

        def write(text: str) -> None:
            _tell(job, stop.add(text))
            if stop.found:
                raise Stopped

        self._watcher.begin(job)
        try:
            answer = self._generator.answer(prompt, write, token, job.sampling)
        except (
            UsageError,
            MemoryShortageError,
        ) as error:  # of this job; what else there is ends us
            job.tell(Failed(error))
            return
        except torch.OutOfMemoryError as error:
            job.tell(Failed(shortage(str(error))))
            return
        _tell(job, stop.end())
        self._watcher.done(job, answer)
        if not job.cancelled:
            reason = "stop" if answer.ended or stop.found else "length"
            job.tell(Ended(reason, len(answer.ids)))


def _tell(job: Job, text: str) -> None:
    if text:
        job.tell(Piece(text))
