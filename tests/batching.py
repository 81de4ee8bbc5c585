"""Who asks a batch for an answer."""

from __future__ import annotations

from engine.generate import Answer, Generator, Request, Sampling


class Owner:
    """Wants one answer."""

    wanted = True

    def __init__(self, generator: Generator, prompt: list[int], sampling: Sampling) -> None:
        self._make = lambda: generator.request(prompt, lambda text: None, sampling=sampling)
        self.ids: list[int] = []

    def request(self) -> Request:
        return self._make()

    def done(self, answer: Answer) -> None:
        self.ids = answer.ids

    def failed(self, error: Exception) -> None:
        raise error
