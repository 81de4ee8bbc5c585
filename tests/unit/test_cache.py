"""The KV cache in one piece: what it holds is what was put in, also when it cannot grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from engine.cache import as_argument, make_cache, past, windows_of
from tests.families import MODELS, WINDOW, theirs


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


def make_model(name: str, attention: str) -> Any:
    config = theirs(MODELS[name])
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", [name for name, config in MODELS.items() if config.get("sliding_window")]
)
def test_a_window_is_that_of_transformers_own_cache(name: str, attention: str) -> None:
    """To the bit, over passes of many tokens and of one, from below the window to far beyond it."""
    model = make_model(name, attention)
    ours = make_cache(3, 1, windows=windows_of(model.config))
    plain = DynamicCache(config=model.config)
    ids = torch.randint(160, (1, 400), generator=torch.Generator().manual_seed(4))
    at = 0
    with torch.inference_mode():
        for count in (4, 1, 1, WINDOW - 6, 1, 1, 1, 30, 1, 5, 1, 300, 1):
            tokens, at = ids[:, at : at + count], at + count
            found, expected = (
                model(tokens, **as_argument(cache), use_cache=True).logits
                for cache in (ours, plain)
            )
            assert torch.equal(found, expected), (at, count)
        assert ours.get_seq_length() == plain.get_seq_length() == at
        whole = model(ids[:, :at], use_cache=False).logits[:, -count:]
        assert torch.allclose(found, whole, atol=1e-4)
        near = model(ids[:, at - count - 2 : at], use_cache=False).logits[:, -count:]
        assert not torch.allclose(found, near, atol=1e-4)  # it does see more than a few


@pytest.mark.usefixtures("one_thread")
def test_tokens_can_be_taken_back_behind_a_window() -> None:
    model = make_model("mistral", "sdpa")
    ids = torch.randint(160, (1, 60), generator=torch.Generator().manual_seed(5))
    cache = make_cache(3, 60, windows=windows_of(model.config))
    with torch.inference_mode():
        model(ids[:, :40], **as_argument(cache), use_cache=True)
        expected = model(ids[:, 40:41], **as_argument(cache), use_cache=True).logits
        model(ids[:, 45:], **as_argument(cache), use_cache=True)
        for layer in past(cache):
            layer.set_length(40)
        found = model(ids[:, 40:41], **as_argument(cache), use_cache=True).logits
    assert torch.equal(found, expected)
