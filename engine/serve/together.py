"""Jobs answered together: each joins the batch when there is room, and leaves when it is done."""

from __future__ import annotations

from common.errors import WeightFeederError
from engine.batch.batch import Batch
from engine.generate import Answer, Generator, Request
from engine.serve.jobs import Job, Scheduler, Telling, Watcher


class Together(Scheduler):
    """Several jobs at once; those for which there is no room wait in the order in which they came."""

    def __init__(self, generator: Generator, batch: Batch, limit: int, watcher: Watcher) -> None:
        """``limit``: how many may wait."""
        super().__init__(limit)
        self._generator, self._batch, self._watcher = generator, batch, watcher
        self._running: set[Job] = set()

    @property
    def running(self) -> int:
        return len(self._running)

    def run(self) -> None:
        try:
            while not self._queue.stopped:
                if self._batch.idle:
                    self._batch.rest()
                    job = self._queue.take()
                    if job is None:
                        return
                    self._add(job)
                for job in self._queue.take_now():
                    self._add(job)
                self._batch.turn()
        finally:
            self._queue.end(self._running)

    def _add(self, job: Job) -> None:
        self._batch.add(_Owner(job, self))

    # For the owners ----------------------------------------------------------------------------

    def telling(self, job: Job) -> Telling:
        return Telling(job, self._watcher)

    def begin(self, job: Job, prompt: list[int], telling: Telling) -> Request:
        """The job's turn has come. UsageError if it cannot be answered."""
        self._running.add(job)
        self._queue.waiting.discard(job)
        telling.begin()
        return self._generator.request(
            prompt, telling.write, telling.token, job.sampling, telling.logprobs
        )

    def ended(self, job: Job) -> None:
        self._running.discard(job)


class _Owner:
    """One job in the batch."""

    def __init__(self, job: Job, jobs: Together) -> None:
        self._job, self._jobs = job, jobs
        self._prompt = job.prompt  # who cancels takes it away, after having said so
        self._telling = jobs.telling(job)

    @property
    def wanted(self) -> bool:
        return not self._job.cancelled

    def request(self) -> Request:
        return self._jobs.begin(self._job, self._prompt, self._telling)

    def done(self, answer: Answer) -> None:
        self._jobs.ended(self._job)
        self._telling.done(answer)

    def failed(self, error: WeightFeederError) -> None:
        self._jobs.ended(self._job)
        self._telling.failed(error)
