"""What a model thinks before it answers, between think tags, is dimmed on a terminal."""

from __future__ import annotations

from engine.pieces import overlap

OPEN, CLOSE = "<think>", "</think>"
_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"


class Dimmed:
    """Adds a terminal's escapes to a text that comes in pieces, of which a tag may span several."""

    def __init__(self, thinking: bool) -> None:
        """``thinking``: the prompt has opened the tag already, as some templates do."""
        self._inside = thinking
        self._held = _DIM if thinking else ""

    def add(self, text: str) -> str:
        """What is to be shown now."""
        shown, text = "", self._held + text
        while True:
            tag = CLOSE if self._inside else OPEN
            before, found, text = text.partition(tag)
            if not found:
                break
            shown += f"{before}{tag}{_PLAIN}" if self._inside else f"{before}{_DIM}{tag}"
            self._inside = not self._inside
        keep = overlap(before, tag)
        self._held = before[len(before) - keep :]
        return shown + before[: len(before) - keep]

    def end(self) -> str:
        """What was held back; and the terminal writes plainly again."""
        text, self._held = self._held, ""
        return text + (_PLAIN if self._inside else "")
