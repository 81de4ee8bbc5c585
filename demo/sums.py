"""The demo's task: adding two decimal numbers digit by digit, in text.

Owns how a sum is drawn, written, worked out and kept apart for evaluation. Knows nothing of
tokens, models or torch.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

HELD_OUT_ONE_IN = 20
_DIGITS = "0123456789"
_NUMBER = re.compile(r"(0|[1-9]\d{0,2})(\.\d{1,2})?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}\s*$")


@dataclass(frozen=True)
class Sum:
    """Two numbers as they are written: up to three digits, a point, up to two decimals."""

    left: str
    right: str

    def __post_init__(self) -> None:
        for number in (self.left, self.right):
            if not _NUMBER.fullmatch(number):
                raise ValueError(
                    f"{number!r} is no number of this task: expected 0 to 999 without leading "
                    "zeros, with at most two decimals"
                )

    @property
    def prompt(self) -> str:
        """The question, such as `1.1+2.3=?`."""
        return f"{self.left}+{self.right}=?"

    @property
    def answer(self) -> str:
        """The sum without needless zeros: `4`, not `4.00`."""
        return canonical(hundredths(self.left) + hundredths(self.right))

    @property
    def working(self) -> str:
        """The text that answers the prompt, first aligned number to closing brace.

        Every step needs only what stands in the lines above, and the carry is spelled out, so
        that each token is easy to predict.
        """
        left, right = f"{hundredths(self.left):05d}", f"{hundredths(self.right):05d}"
        lines = [f"{_pointed(left)}+{_pointed(right)}"]
        terms, written, carry = "{}+{}", "", 0
        for a, b in zip(reversed(left), reversed(right), strict=True):
            total = int(a) + int(b) + carry
            shown = terms.format(a, b, carry)
            digit, carry = total % 10, total // 10
            lines.append(f"{shown}={total} write {digit} carry {carry}")
            terms, written = "{}+{}+{}", f"{digit}{written}"
        lines.append(_pointed(f"{carry}{written}"))
        lines.append(rf"\boxed{{{self.answer}}}")
        return "\n".join(lines)

    @property
    def held_out(self) -> bool:
        """Whether this sum is for evaluation only.

        Decided by a hash of the two values, so that neither another spelling (1.5 and 1.50) nor
        the swapped order of a held-out sum is ever trained on.
        """
        values = sorted((hundredths(self.left), hundredths(self.right)))
        return zlib.crc32(f"{values[0]} {values[1]}".encode()) % HELD_OUT_ONE_IN == 0


def hundredths(number: str) -> int:
    """The value of a written number in hundredths: `2.3` is 230."""
    whole, _, decimals = number.partition(".")
    return int(whole + decimals.ljust(2, "0"))


def canonical(value: int) -> str:
    """A value in hundredths as text without trailing zeros or trailing point."""
    whole, rest = divmod(value, 100)
    return f"{whole}.{rest:02d}".rstrip("0").rstrip(".")


def boxed(text: str) -> str | None:
    r"""What stands in the `\boxed{}` that ends the text, or None."""
    found = _BOXED.search(text)
    return found[1] if found else None


def draw(rng: random.Random, held_out: bool, striking: bool = False) -> Sum:
    """A random sum from one side of the split; short and long numbers are equally likely.

    Striking sums are those a person types first, such as 999.99+999.99 or 100+0.01: numbers of
    one or two different digits. Random digits hardly ever come out so.
    """
    while True:
        left = _draw_digits(rng) if striking else _DIGITS
        right = left if rng.random() < 0.5 or not striking else _draw_digits(rng)
        candidate = Sum(_draw_number(rng, left), _draw_number(rng, right))
        if candidate.held_out == held_out:
            return candidate


def _draw_digits(rng: random.Random) -> str:
    return "".join(rng.choices(_DIGITS, k=rng.randint(1, 2)))


def _draw_number(rng: random.Random, digits: str) -> str:
    wholes, decimals = rng.randrange(4), rng.randrange(3)
    first = digits.replace("0", "")
    whole = "0"
    if wholes and first:
        whole = rng.choice(first) + "".join(rng.choices(digits, k=wholes - 1))
    return f"{whole}.{''.join(rng.choices(digits, k=decimals))}".rstrip(".")


def _pointed(digits: str) -> str:
    return f"{digits[:-2]}.{digits[-2:]}"
