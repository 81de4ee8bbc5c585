"""What is to be generated, who waits for it, and in which order it is done.

The seam between the server and the model: on one side requests become jobs and wait for events, on the
other a scheduler answers jobs, one by one here or several together in engine/serve/together.py. Knows
neither HTTP nor the shape of replies.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch

from common.errors import MemoryShortageError, UsageError, WeightFeederError
from engine.generate import Answer, Generator, Sampling, Stopped
from engine.logprobs import Logprob, Logprobs
from engine.pieces import StopText
from engine.shortage import shortage


class Placed(NamedTuple):
    """How likely a token was whose text begins at a character of the answer's."""

    offset: int
    logprob: Logprob


@dataclass(frozen=True)
class Piece:
    """The text goes on. ``logprobs``: of the tokens that begin in it, if they were asked for."""

    text: str
    logprobs: tuple[Placed, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The text is complete. ``reason``: stop or length. ``kept``: of the prompt's tokens so many were in
    the KV cache already."""

    reason: str
    tokens: int
    kept: int = 0


@dataclass(frozen=True)
class Failed:
    """There is no more. ``error``: a UsageError if the request is to blame."""

    error: WeightFeederError


Event = Piece | Ended | Failed


class Job:
    """One answer to be generated. ``tell`` gets its events, in the scheduler's thread; the last is
    Ended or Failed, and there is none if it was cancelled. ``logprobs``: whether log probabilities are
    wanted, and of how many of the likeliest tokens at each place beside the one that was chosen."""

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        stops: tuple[str, ...],
        tell: Callable[[Event], None],
        logprobs: int | None = None,
    ) -> None:
        self.prompt, self.sampling, self.stops, self.tell = prompt, sampling, stops, tell
        self.logprobs = logprobs
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

    def failed(self, job: Job) -> None: ...


class Queue:
    """The jobs that wait, in the order in which they came. Made for one thread that submits and one that
    takes."""

    def __init__(self, limit: int) -> None:
        """``limit``: how many may wait."""
        self._limit = limit
        # A queue that a signal's exception may leave at any point; of the set each step is atomic.
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self.waiting: set[Job] = set()
        self.stopped = False

    def submit(self, *jobs: Job) -> None:
        """Those of one request, all or none: once there is room for one, there is for all of them. Busy or
        Ending if they cannot be taken."""
        if self.stopped:
            raise Ending("the server is ending")
        if len(self.waiting) >= self._limit:
            raise Busy(f"{len(self.waiting)} requests wait already: try again later")
        self.waiting.update(jobs)
        for job in jobs:
            self._queue.put(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more."""
        job.cancelled = True
        job.prompt = []  # it stays in the queue, and need not take memory there
        self.waiting.discard(job)

    def stop(self) -> None:
        """Take no more, and tell whoever takes."""
        self.stopped = True
        self._queue.put(None)

    def take(self) -> Job | None:
        """The next, which may have been cancelled; waits for it. None after `stop`."""
        return self._queue.get()

    def take_now(self) -> Iterator[Job]:
        """Those that are there by now. Ends amid them after `stop`."""
        while not self._queue.empty() and (job := self._queue.get()) is not None:
            yield job

    def end(self, running: Iterable[Job]) -> None:
        """Nobody takes any more: tell all that are left."""
        self.stopped = True
        for job in [*running, *self.waiting]:
            job.tell(Failed(Ending("the server has ended before this was answered")))
        self.waiting.clear()


class Telling:
    """What becomes of the tokens of one job: its events, and the watcher's figures."""

    def __init__(self, job: Job, watcher: Watcher) -> None:
        self.job, self._watcher = job, watcher
        self._stop = StopText(job.stops)
        self._seen = 0
        #: Measures what the job wants measured.
        self.logprobs = None if job.logprobs is None else Logprobs(job.logprobs, self._measured)
        self._made = self._told = 0  # characters of text: with what is held back, and without
        self._placed: deque[Placed] = deque()  # whose text is not told

    def begin(self) -> None:
        self._watcher.begin(self.job)

    def token(self) -> None:
        """One is there. Raises Stopped if nobody wants it."""
        if self.job.cancelled:
            raise Stopped
        self._seen += 1
        self._watcher.token(self.job, self._seen == 1)

    def write(self, text: str) -> None:
        """Text is there. Raises Stopped if it ends with it."""
        self._made += len(text)
        self._tell(self._stop.add(text))
        if self._stop.found:
            raise Stopped

    def done(self, answer: Answer) -> None:
        """There is no more."""
        self._tell(self._stop.end())
        self._watcher.done(self.job, answer)
        if not self.job.cancelled:
            reason = "stop" if answer.ended or self._stop.found else "length"
            self.job.tell(Ended(reason, len(answer.ids), answer.kept))

    def failed(self, error: WeightFeederError) -> None:
        """It cannot be answered."""
        self._watcher.failed(self.job)
        self.job.tell(Failed(error))

    def _measured(self, logprob: Logprob) -> None:
        self._placed.append(Placed(self._made, logprob))

    def _tell(self, text: str) -> None:
        if not text:
            return
        self._told += len(text)
        placed = []
        while self._placed and self._placed[0].offset < self._told:
            placed.append(self._placed.popleft())
        self.job.tell(Piece(text, tuple(placed)))


class Scheduler(ABC):
    """Answers jobs. ``run`` is for the thread that owns the model, the rest for the server's."""

    def __init__(self, limit: int) -> None:
        """``limit``: how many may wait."""
        self._queue = Queue(limit)

    @property
    def waiting(self) -> int:
        return len(self._queue.waiting)

    @property
    @abstractmethod
    def running(self) -> int: ...

    def submit(self, *jobs: Job) -> None:
        """Those of one request. Busy or Ending if they cannot be taken."""
        self._queue.submit(*jobs)

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more. Nothing happens if it is done."""
        self._queue.cancel(job)

    @abstractmethod
    def run(self) -> None:
        """Answer jobs until `stop`, or until something goes wrong that concerns them all."""

    def stop(self) -> None:
        """Take no more jobs, and let ``run`` return when it looks for the next."""
        self._queue.stop()


class OneByOne(Scheduler):
    """One job after the other, in the order in which they came."""

    def __init__(self, generator: Generator, limit: int, watcher: Watcher) -> None:
        """``limit``: how many may wait."""
        super().__init__(limit)
        self._generator, self._watcher = generator, watcher
        self._current: Job | None = None

    @property
    def running(self) -> int:
        return int(self._current is not None)

    def run(self) -> None:
        try:
            while (job := self._queue.take()) is not None:
                self._current = job
                self._queue.waiting.discard(job)
                prompt = job.prompt
                if not job.cancelled:
                    self._answer(job, prompt)
                self._current = None
        finally:
            self._queue.end([self._current] if self._current else [])

    def _answer(self, job: Job, prompt: list[int]) -> None:
        telling = Telling(job, self._watcher)
        telling.begin()
        try:
            answer = self._generator.answer(
                prompt, telling.write, telling.token, job.sampling,
                # A part of a prompt rounds otherwise than the whole: a seed is to give the same text again.
                reuse=job.sampling.seed is None, logprobs=telling.logprobs,
            )  # fmt: skip
        except (
            UsageError,
            MemoryShortageError,
        ) as error:  # of this job; what else there is ends us
            telling.failed(error)
            return
        except torch.OutOfMemoryError as error:
            telling.failed(shortage(str(error)))
            return
        telling.done(answer)
