"""The methods of quantizing by name, and the one that is taken if none is named.

All write the same format, so they differ in quality and in the time they take, and in nothing that
a reader sees. docs/quality.md has them measured. Most go by the values of a block and nothing else;
the calibrated ones by text that runs through the model. Needs no torch until a rule is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import UsageError

if TYPE_CHECKING:
    from common.int4 import Rule

METHODS = {
    "weighted": "per block, the sign and scale with the least squared error, large values counting more",
    "search": "the same, all values counting alike",
    "hqq": "per block, half-quadratic steps to the least sum of square roots of the errors",
    "absmax": "the largest magnitude over 7",
}
CALIBRATED = {
    "gptq": "column by column, each mending the errors of those before it, for the inputs that a text"
    " makes",
}
DEFAULT = "weighted"


def rule(method: str) -> Rule:
    """What turns blocks of values into codes and scales, of a method that needs no data. UsageError
    for another name."""
    if method == "absmax":
        from common.int4 import absmax

        return absmax
    if method == "search":
        from feeder.search import search

        return search
    if method == "weighted":
        from feeder.search import weighted

        return weighted
    if method == "hqq":
        from feeder.hqq import hqq

        return hqq
    known = ", ".join([*METHODS, *CALIBRATED])
    raise UsageError(f"method {method!r:.40} is not known: name one of {known}")
