"""What was typed before, for the arrow keys: kept between sessions in a file that only its user reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.log import log

LINES = 1000


def history_path() -> Path:
    """Where it is kept."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "weight-feeder" / "chat_history"


@contextmanager
def history(kept: bool) -> Iterator[None]:
    """``input`` edits lines from now on; those of this session are added to the file at its end.

    ``kept``: whether there is a file. One that cannot be had costs only the lines of former sessions.
    """
    import readline

    if not kept:
        yield
        return
    path = history_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        readline.read_history_file(path)
    except OSError as error:
        log.debug("no history of former chats: %s", error)
        yield
        return
    readline.set_history_length(LINES)
    before = readline.get_current_history_length()
    try:
        yield
    finally:
        new = readline.get_current_history_length() - before
        with suppress(OSError):  # another session's lines stay: ours are added
            if new > 0:
                readline.append_history_file(new, path)
