"""How a process of this project begins and ends: logs, leash, exit codes, and one line for an error."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from common.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, InternalError, WeightFeederError
from common.log import is_json, log, report_error, setup
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
            _trace_back()
        _tell(leash, str(error), error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left: nobody is there to be told
        return EXIT_ERROR
    except Exception as error:
        _trace_back()
        _tell(leash, f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}", EXIT_ERROR)
        return EXIT_ERROR


def at_last(work: Callable[[], object]) -> Callable[..., bool]:
    """For ``ExitStack.push``: does ``work`` at the end. What goes wrong there, when something went
    wrong before, is only logged: the first cause is what ends the process."""

    def leave(
        kind: type[BaseException] | None, first: BaseException | None, _: TracebackType | None
    ) -> bool:
        try:
            work()
        except Exception as error:
            if first is None:
                raise
            log.warning("and while ending: %s", " ".join(str(error).split()) or repr(error))
        return False

    return leave


def _trace_back() -> None:
    """Where the exception that is being handled came from."""
    if is_json():
        log.error("a defect, or --verbose: where it happened", exc_info=True)
    else:
        traceback.print_exc()


def _tell(leash: Leash, text: str, exit_code: int) -> None:
    line = " ".join(text.split())
    if not leash.report(line):
        report_error(line, exit_code)
