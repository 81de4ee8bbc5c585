"""Imports of large libraries in less time. Knows no library but by the names it is given."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def quick_imports(hidden: Sequence[str] = ()) -> Iterator[None]:
    """For ``with``: while modules are imported, nothing is collected, and the packages ``hidden`` seem not
    to be installed unless they have been imported before.

    Torch and transformers make hundreds of thousands of objects that stay; to look through them for garbage
    again and again is a fifth of the time. What was imported is left out of all later collections, too,
    which would otherwise halt a token for as long; so is what garbage the imports made, which stays.
    """
    absent = [name for name in hidden if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: as the language has it
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # what is never freed counts as a leak with some libraries
        if collects:
            gc.enable()
        for name in absent:
            sys.modules.pop(name, None)
