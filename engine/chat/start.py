"""``python -m engine chat``: a person at a terminal talks with the model.

Lines come through readline, so arrow keys edit them and bring former ones back. Ctrl-C stops an answer,
not the program. The main thread does it all; the client's keeper serves the feeder meanwhile.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from common.errors import MemoryShortageError, UsageError
from common.log import log
from common.process import Leash, TerminatedNow
from engine.chat.conversation import Conversation
from engine.chat.dim import OPEN, Dimmed
from engine.chat.history import history

if TYPE_CHECKING:
    from engine.generate import Answer
    from engine.start import Ready
    from engine.text import Codec

FENCE = '"""'  # begins and ends a text of several lines
HELP = f"""\
{FENCE}            begins and ends a text of several lines
/system TEXT   what the model is told first; without a text: nothing
/reset         forget what was said
/save FILE     write the conversation to a new file, as JSON
/stats         figures of the last answer
/exit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def run(arguments: argparse.Namespace, leash: Leash) -> None:
    """Talk until the input ends. Raises WeightFeederError."""
    from engine.start import sampling_of, with_model

    def work(ready: Ready) -> None:
        from engine.text import codec_for

        chat = Chat(ready, codec_for(ready.store), Conversation(arguments.system))
        with history(not arguments.no_history) if chat.on_terminal else nullcontext():
            chat.run()

    with_model(arguments, leash, sampling_of(arguments), work)


@dataclass
class _Last:
    """The last answer, how many tokens its prompt had, and the time that the engine waited for weights."""

    answer: Answer
    prompt_tokens: int
    stall_s: float


class Chat:
    """The loop of questions, commands and answers."""

    def __init__(self, ready: Ready, codec: Codec, conversation: Conversation) -> None:
        self._ready, self._codec, self._conversation = ready, codec, conversation
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._last: _Last | None = None

    def run(self) -> None:
        """Until the input ends, or /exit. UsageError if the model has no chat template."""
        self._codec.encode_chat([{"role": "user", "content": "?"}])
        log.info("talk to the model; /help says what else, Ctrl-D ends")
        while True:
            try:
                text = self._read()
            except EOFError:
                if self.on_terminal:
                    print()
                return
            except TerminatedNow:
                raise
            except KeyboardInterrupt:  # Ctrl-C while a line is written: another line
                print()
                continue
            if text.strip() == "/exit":
                return
            try:
                self._obey(text)
            except (UsageError, MemoryShortageError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def _read(self) -> str:
        line = input("> " if self.on_terminal else "")
        if not line.startswith(FENCE):
            return line
        lines = [line.removeprefix(FENCE)]
        while not lines[-1].endswith(FENCE):
            lines.append(input(". " if self.on_terminal else ""))
        lines[-1] = lines[-1].removesuffix(FENCE)
        return "\n".join(lines).strip("\n")

    def _obey(self, text: str) -> None:
        word, _, rest = text.strip().partition(" ")
        if not word:
            return
        match word:
            case "/help":
                _say(HELP)
            case "/system":
                self._conversation.system = rest.strip() or None
            case "/reset":
                self._conversation.reset()
                _say("all that was said is forgotten")
            case "/save":
                if not rest.strip():
                    raise UsageError("/save takes the name of a file")
                self._conversation.save(rest.strip())
                _say(f"the conversation is in {rest.strip()}")
            case "/stats":
                _say(self._stats())
            case _ if word.startswith("/") and "/" not in word[1:]:
                raise UsageError(f"{word} is no command: /help names them")
            case _:
                self._ask(text)

    def _ask(self, text: str) -> None:
        conversation = self._conversation
        conversation.ask(text)
        try:
            prompt = self._prompt()
            answer = self._answer(prompt)
        except BaseException:
            conversation.withdraw()
            raise
        conversation.answer(answer.text)

    def _prompt(self) -> list[int]:
        """The tokens of the conversation, of which the oldest part goes if it no longer fits."""
        generator, forgotten = self._ready.generator, 0
        # Kept for the answer: what it may have, but not more than a quarter of the context.
        room = min(generator.max_new_tokens, generator.context // 4)
        while True:
            prompt = self._codec.encode_chat(self._conversation.messages)
            if len(prompt) + room <= generator.context or not self._conversation.forget_oldest():
                break
            forgotten += 1
        if forgotten:
            log.info(
                "the context of %d tokens is full: the oldest %d questions and answers are forgotten",
                generator.context,
                forgotten,
            )
        return prompt

    def _answer(self, prompt: list[int]) -> Answer:
        from engine.generate import Stopped

        thinking = self._codec.decode(prompt[-8:]).rstrip().endswith(OPEN)
        dimmed = Dimmed(thinking) if self.on_terminal and "NO_COLOR" not in os.environ else None
        stats = self._ready.client.stats
        stall_s = stats.stall_s

        def write(text: str) -> None:
            sys.stdout.write(dimmed.add(text) if dimmed else text)
            sys.stdout.flush()

        with _interrupts() as interrupted:

            def token() -> None:
                if interrupted:
                    raise Stopped

            try:
                answer = self._ready.generator.answer(prompt, write, token, reuse=True)
            finally:
                sys.stdout.write((dimmed.end() if dimmed else "") + "\n")
                sys.stdout.flush()
        self._last = _Last(answer, len(prompt), stats.stall_s - stall_s)
        return answer

    def _stats(self) -> str:
        from engine.report import candidates_said

        if self._last is None:
            return "no answer yet"
        answer, seconds = self._last.answer, self._last.answer.seconds
        said = self._ready.client.ask_status()
        rate = len(answer.ids) / seconds if seconds else 0.0
        stalled = min(1.0, self._last.stall_s / seconds) if seconds else 0.0
        speculation = self._ready.speculation
        candidates = candidates_said(speculation.figures()) if speculation else ""
        return (
            f"{len(answer.ids)} tokens in {seconds:.2f} s: {rate:.2f} tok/s, TTFT"
            f" {answer.ttft_s:.3f} s, stalled {100 * stalled:.0f} %; prompt of"
            f" {self._last.prompt_tokens} tokens, {answer.kept} of them kept; strategy"
            f" {said.get('strategy', '?')}, cache {said.get('cache', '?')}"
            f"{'; so far, ' if candidates else ''}{candidates}"
        )


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While it is open, Ctrl-C is noted in the list. The second one ends the program."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
