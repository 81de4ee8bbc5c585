"""The prompts of a file, answered together. Their texts come out in the order of the file."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

from common.errors import WeightFeederError
from engine.batch.batch import Batch
from engine.generate import Answer, Generator, Request
from engine.prompts import Prompt, record
from engine.report import Report


def answer_together(
    prompts: Sequence[Prompt],
    generator: Generator,
    batch: Batch,
    report: Report,
    tick: Callable[[], None],
    output: TextIO,
) -> None:
    """Answer all; records go to ``output``, texts to stdout if that is another. ``tick`` is called after
    each pass. Raises what went wrong with a prompt, when those before it are answered."""
    start = time.perf_counter()
    owners = [_Owner(prompt, generator, report) for prompt in prompts]
    order = _InOrder(output, owners)
    for owner in owners:
        batch.add(owner)
    failed: WeightFeederError | None = None
    while not batch.idle:
        batch.turn()
        tick()
        failed = order.write()
        if failed is not None:
            break
    batch.rest()
    report.together(time.perf_counter() - start)
    if failed is not None:
        raise failed


class _Owner:
    """One prompt and what there is of its answer."""

    def __init__(self, prompt: Prompt, generator: Generator, report: Report) -> None:
        self.prompt = prompt
        self._generator, self._report = generator, report
        self.text = ""  # that nobody has written yet
        self.answer: Answer | None = None
        self.error: WeightFeederError | None = None
        self.wanted = True

    def request(self) -> Request:
        return self._generator.request(self.prompt.text, self._write, self._report.token)

    def done(self, answer: Answer) -> None:
        self.answer = answer
        self._report.add(answer)

    def failed(self, error: WeightFeederError) -> None:
        self.error = error

    def _write(self, text: str) -> None:
        self.text += text


class _InOrder:
    """Writes the texts one after the other, the first that is not complete as it is made."""

    def __init__(self, output: TextIO, owners: Sequence[_Owner]) -> None:
        self._output, self._owners = output, deque(owners)
        self._show = output is not sys.stdout  # the JSON lines have stdout to themselves

    def write(self) -> WeightFeederError | None:
        """What can be written by now. The error of the first prompt that cannot be answered."""
        while self._owners:
            owner = self._owners[0]
            if owner.error is not None:
                return owner.error
            text, owner.text = owner.text, ""
            if owner.answer is not None:
                text += "\n"
            if self._show and text:
                sys.stdout.write(text)
                sys.stdout.flush()
            if owner.answer is None:
                return None
            answer = owner.answer
            line = record(owner.prompt, answer.text, len(answer.ids), answer.seconds, answer.ttft_s)
            self._output.write(line + "\n")
            self._output.flush()
            self._owners.popleft()
        return None
