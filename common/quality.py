"""How near a store's text is to that of its original, as measured: the figures, and in words.

Owns what makes such figures sane. Knows nothing of how they are measured (`feeder.divergence`), and
needs no torch: a store's index may carry them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_LARGEST = 1e300
MAX_NAME = 120


@dataclass(frozen=True)
class Quality:
    """Of the next-token distributions on one text, in fp32. The divergence is in nats, of the store's
    distribution from the original's; ``top1_agreement``: how often both find the same token likeliest.
    """

    kl_mean: float
    kl_p99: float
    perplexity: float
    perplexity_original: float
    top1_agreement: float
    tokens: int
    text: str
    text_checksum: str

    def __post_init__(self) -> None:
        """ValueError, saying which, if a figure cannot be one."""
        for name in ("kl_mean", "kl_p99", "perplexity", "perplexity_original", "top1_agreement"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r:.40}, expected a number")
            least = -1e-3 if name.startswith("kl_") else 0  # a divergence of 0 may be rounded down
            if not least <= value <= _LARGEST:  # false for NaN
                raise ValueError(f"{name} is {value!r:.40}, expected a finite number from 0 up")
        if self.top1_agreement > 1:
            raise ValueError(f"top1_agreement is {self.top1_agreement!r}, expected 1 at most")
        if type(self.tokens) is not int or self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens!r:.40}, expected a number from 1 up")
        if (
            not isinstance(self.text, str)
            or len(self.text) > MAX_NAME
            or not self.text.isprintable()
        ):
            raise ValueError(f"text is {self.text!r:.40}, expected a name of {MAX_NAME} letters")
        if not isinstance(self.text_checksum, str) or not _CHECKSUM.fullmatch(self.text_checksum):
            raise ValueError(
                f"text_checksum is {self.text_checksum!r:.40}, expected 32 hexadecimal digits"
            )

    @classmethod
    def parse(cls, data: Any) -> Quality:
        """The inverse of `as_json`. ValueError if it is none."""
        names = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or not all(name in data for name in names):
            raise ValueError(f"found {data!r:.40}, expected an object with {', '.join(names)}")
        return cls(**{name: data[name] for name in names})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl_mean:.2g} (99th percentile {self.kl_p99:.2g}), perplexity"
            f" {self.perplexity:.4g} (original {self.perplexity_original:.4g}), agreement"
            f" {100 * self.top1_agreement:.3g} % on {self.tokens} tokens of {self.text}"
        )
