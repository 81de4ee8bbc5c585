"""Which token a sampled text goes on with, where a draft has proposed one. On the device, no waiting.

The rule of speculative sampling: Leviathan, Kalman and Matias, 2023, "Fast inference from transformers
via speculative decoding"; Chen et al., 2023, "Accelerating large language model decoding with speculative
sampling". Whatever the draft believes, the token has the target's distribution.
"""

from __future__ import annotations

import torch


def draw(
    chances: torch.Tensor,
    candidate: torch.Tensor | None = None,
    believed: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token, int64 [1, 1], of the distribution ``chances``, p [1, vocabulary].

    ``candidate``, int64 [1, 1], was drawn from ``believed``, q [1, vocabulary]. It is taken with
    probability min(1, p/q); else the token is drawn from what p has more than q.
    """
    if candidate is None or believed is None:
        return torch.multinomial(chances, num_samples=1)
    ratio = chances.gather(1, candidate) / believed.gather(1, candidate)
    taken = torch.rand_like(ratio) < ratio
    rest = (chances - believed).clamp_(min=0)
    # Equal distributions leave nothing, and then nothing is refused; a draw needs something all the same.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, chances)
    return torch.where(taken, candidate, torch.multinomial(rest, num_samples=1))
