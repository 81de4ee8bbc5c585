"""How likely tokens were: log probabilities by the model's own distribution.

That is the log-softmax of its logits as they are, in fp32, before temperature, penalties and whatever else
has a say in the choice. Knows neither requests nor text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Logprob:
    """Of a token that was chosen. ``top``: the likeliest tokens there and theirs, the first first."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...]


class Logprobs:
    """What of one answer's tokens is measured, and who is told."""

    def __init__(self, count: int, tell: Callable[[Logprob], None]) -> None:
        """``count``: how many of the likeliest tokens are named at each place."""
        self._count, self._tell = count, tell

    def measure(self, logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """For a token [1, 1] that ``logits`` [1, vocabulary] were for: what `told` takes, on its way to the
        host. There it is read no sooner than what is queued after it."""
        found = torch.log_softmax(logits.to(torch.float32), dim=-1).view(-1)
        top = found.topk(min(self._count, found.numel()))
        values = found[token.view(-1)], top.values, top.indices
        return to_host(torch.cat([value.to(torch.float64) for value in values]))

    def told(self, token: int, measured: Sequence[float]) -> None:
        """The token goes into the text."""
        count = len(measured) // 2
        names = (int(name) for name in measured[1 + count :])
        top = tuple(zip(names, measured[1 : 1 + count], strict=True))
        self._tell(Logprob(token, measured[0], top))


def to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy on the host, which is complete when what is queued on the device is; the host does not wait."""
    if not values.is_cuda:
        return values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return copy.copy_(values, non_blocking=True)
