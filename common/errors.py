"""One tree of exceptions, and the exit codes that processes end with.

Owns: what can go wrong in a way that a user can mend, and how a process reports it.
Knows nothing of who raises or catches these; imports nothing.

Every message is one line that says what was found, what was expected, and what to do.
A command-line entry point prints it as ``error: MESSAGE`` and returns ``error.exit_code``;
anything that is not a `WeightFeederError` is a defect and keeps its traceback.
"""

from typing import ClassVar

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_TERMINATED = 143  # 128 + SIGTERM


class WeightFeederError(Exception):
    """A mistake or a condition that a user can mend; ``str(error)`` is one clear line."""

    exit_code: ClassVar[int] = EXIT_ERROR


class UsageError(WeightFeederError):
    """The command line asks for something impossible or contradictory."""

    exit_code: ClassVar[int] = EXIT_USAGE


class ConfigError(WeightFeederError):
    """A model's config.json, or a setting, is missing, not understood or absurd."""


class CheckpointError(WeightFeederError):
    """A Hugging Face checkpoint is incomplete, damaged or of an unsupported kind."""


class StoreError(WeightFeederError):
    """A store is missing, exists where none may, or does not obey docs/format.md."""


class StoreCorruptError(StoreError):
    """The bytes of a store are not those that were written: a checksum differs."""


class ProtocolError(WeightFeederError):
    """A message is malformed, of another version, or for another store."""


class MemoryShortageError(WeightFeederError):
    """Device or host memory does not suffice for what was asked."""


class PeerError(WeightFeederError):
    """The other process failed, vanished or refused."""


class SlotCorruptError(WeightFeederError):
    """Verify mode: a slot does not hold what was filled into it."""


class StrategyError(UsageError):
    """A strategy is unknown, or answered with something it may not ask for."""


class InternalError(WeightFeederError):
    """An invariant of this program does not hold: a defect, please report it."""
