"""Verify mode: checksums of slots, and poison for freed ones. Slow, and not run unless asked for."""

from __future__ import annotations

import torch

_CHUNK = 1 << 24  # elements at once, so that the temporaries stay small
_PERIOD = 65521  # a prime: the weights of neighbours, and of rows of any usual length, differ


def slot_checksum(data: torch.Tensor) -> int:
    """A checksum of a slot's bytes (uint8, an even number), the same on every device.

    A sum of the 16-bit words, each times its position's weight, in integers: exact, and sensitive to
    words that change, move or are left over from another weight. From 0 to 2**62 - 1.
    """
    words = data.view(torch.int16)
    total = 0
    for start in range(0, words.numel(), _CHUNK):
        piece = words[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + piece.numel(), device=data.device) % _PERIOD + 1
        total += int((piece * place).sum())
    return total % (1 << 62)


def poison(data: torch.Tensor) -> None:
    """Fill a freed slot with NaN, in whatever floating dtype it is read: what is multiplied by it shows."""
    data.fill_(0xFF)
