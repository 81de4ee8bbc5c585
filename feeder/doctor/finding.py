"""What a check found, and for whom it looked. Knows no check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line. ``mend``: a command or setting; every finding that is not ok has one."""

    level: Level
    name: str
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if self.level != "ok" and not self.mend:
            raise ValueError(f"{self.name}: a finding that is not ok says what to do")

    def __str__(self) -> str:
        mend = f"; to mend: {self.mend}" if self.mend else ""
        return f"{self.level:4}  {self.name:14}  {self.found}{mend}"


@dataclass(frozen=True)
class Patient:
    """``device``: what a run would take, ``cuda``, ``cuda:1`` or ``cpu``. ``packed_bytes`` of the
    model that is to run; 0 if none was named."""

    device: str
    packed_bytes: int = 0

    @property
    def on_cuda(self) -> bool:
        return self.device != "cpu"


Check = Callable[[Patient], Iterator[Finding]]


def findings(checks: list[Check], patient: Patient) -> Iterator[Finding]:
    """Of all checks; one that breaks is a finding too, and stops no other."""
    for check in checks:
        try:
            yield from check(patient)
        except Exception as error:
            name = check.__name__.replace("_", " ")
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            mend = "what this error says; if it says nothing, please report it"
            yield Finding("fail", name, f"cannot be checked: {text}", mend)
