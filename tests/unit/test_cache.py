"""The KV cache in one piece: what it holds is what was put in, also when it cannot grow."""

from __future__ import annotations

import pytest
import torch

from engine.cache import make_cache


def test_a_cache_that_cannot_grow_is_as_it_was() -> None:
    cache = make_cache(1, 1)
    first = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(2))
    cache.update(first, 2 * first, 0)
    endless = torch.zeros(1, 2, 1, 8).expand(1, 2, 1 << 44, 8)  # takes no memory, but to copy it
    for _ in range(2):
        with pytest.raises(RuntimeError):
            cache.update(endless, endless, 0)
        assert cache.get_seq_length() == 5
    more = first[:, :, :1].expand(1, 2, 300, 8)
    keys, values = cache.update(more, more, 0)
    assert torch.equal(keys, torch.cat([first, more], -2))
    assert torch.equal(values, torch.cat([2 * first, more], -2))
