"""What was said: the system's words, then questions and answers in turn. Knows no model and no terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path

from common.errors import UsageError


class Conversation:
    """Grows by a question and its answer at a time."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._said: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """All of it, as chat templates take it."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self._said

    def ask(self, text: str) -> None:
        """The next question."""
        self._said.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The answer to the last question."""
        self._said.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """The last question was not answered, and is as if not asked."""
        self._said.pop()

    def forget_oldest(self) -> bool:
        """Drop the oldest question and its answer; False if there is only the newest question."""
        if len(self._said) < 3:
            return False
        del self._said[:2]
        return True

    def reset(self) -> None:
        """Forget all but the system's words."""
        self._said.clear()

    def save(self, path: str) -> None:
        """Write it to a new file, as JSON. UsageError if it exists, or cannot be written."""
        try:
            with Path(os.path.expanduser(path)).open("x", encoding="utf-8") as file:
                json.dump({"messages": self.messages}, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except FileExistsError:
            raise UsageError(f"{path} exists: name another file") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{path} cannot be written: {reason}") from error
