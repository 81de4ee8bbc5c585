"""Four-bit numbers in 32-bit words, as INT4 checkpoints have them: eight a word, the lowest bits first."""

from __future__ import annotations

import torch

PER_WORD = 8


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., n] to uint8 [..., 8 n]: the numbers 0 to 15 of each word, from its lowest bits up."""
    octets = (
        words.reshape(-1).contiguous().view(torch.uint8)
    )  # little endian: the lowest byte first
    return torch.stack((octets & 15, octets >> 4), dim=-1).view(*words.shape[:-1], -1)
