"""How a process of this project begins and ends: logs, leash, exit codes, and one line for an error."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from common.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, InternalError, WeightFeederError
from common.log import setup
from common.process import Leash, Terminated, TerminatedNow


def run_process(name: str, verbose: bool, work: Callable[[Leash], None]) -> int:
    """Run ``work`` and return the exit code. What went wrong goes to the launcher that started this
    process, which prints it last, or to stderr as one line. Only a defect shows a traceback."""
    setup(name, verbose)
    leash = Leash()
    try:
        work(leash)
        return EXIT_OK
    except (Terminated, TerminatedNow) as ended:
        return ended.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except WeightFeederError as error:
        if verbose or isinstance(error, InternalError):
            traceback.print_exc()
        _tell(leash, str(error))
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left: nobody is there to be told
        return EXIT_ERROR
    except Exception as error:
        traceback.print_exc()
        _tell(leash, f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}")
        return EXIT_ERROR


def _tell(leash: Leash, text: str) -> None:
    line = " ".join(text.split())
    if not leash.report(line):
        print(f"error: {line}", file=sys.stderr, flush=True)
