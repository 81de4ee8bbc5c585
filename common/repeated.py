"""Launches of one kernel again and again: the variant is found once.

To find a kernel's compiled variant for some operands takes Triton several times as long as to launch it. A
pass over several tokens makes the same launches for each, and each token those of the one before it, with
operands that are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Repeated:
    """A kernel with its grid, its constants and options. All calls are to have operands of the same dtypes,
    aligned alike, and the same numbers, or numbers that no variant is made for."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], **options: Any) -> None:
        """``options``: constants and the launch's options, by name."""
        self._kernel, self._grid, self._options = kernel, grid, options
        self._found: Any = None
        self._again: Callable[..., object] | None = None
        self._constants: tuple[Any, ...] = ()

    def __call__(self, *operands: Any) -> None:
        """Queue it on the current stream. ``operands``: those that are no constants, in order."""
        if self._found is None:  # at first, and in the interpreter, which compiles nothing
            self._found = self._kernel[self._grid](*operands, **self._options)
            return
        if self._again is None:
            names = self._kernel.arg_names[len(operands) :]
            self._constants = tuple(self._options[name] for name in names)
            self._again = self._found[(*self._grid, 1, 1)[:3]]
        self._again(*operands, *self._constants)
