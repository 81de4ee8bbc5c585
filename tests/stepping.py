"""Steps compared with transformers' own forward pass, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.cache import CACHE_ARGUMENT, as_argument, make_cache, past, reserve

#: Of small models whose weights can all be packed.
LAYER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "sliding_window": 512,
    "pad_token_id": None,
}
#: After the second, memory for the past has to grow.
PROMPT_TOKENS = (6, 250)


def assert_stepped_as_plain(
    step: Callable[..., torch.Tensor], model: Any, reference: Any, count: int
) -> None:
    """The logits of ``count`` tokens after each of two prompts, by the step, are the reference's to the
    last bit."""
    generator = torch.Generator().manual_seed(8)
    vocabulary = model.config.vocab_size
    for length in PROMPT_TOKENS:
        ids = torch.randint(vocabulary, (1, length + count), generator=generator).to(model.device)
        cache = make_cache(model.config.num_hidden_layers, length)
        with torch.inference_mode():
            prompt = {"input_ids": ids[:, :length], "use_cache": True, "logits_to_keep": 1}
            model(**prompt, **as_argument(cache))
            theirs = reference(**prompt)[CACHE_ARGUMENT]
            for at in range(length, length + count):
                token = ids[:, at : at + 1]
                reserve(cache, at + 1)
                found = step(token, cache)
                output = reference(input_ids=token, **as_argument(theirs), use_cache=True)
                expected = output.logits[:, -1]
                assert expected.isfinite().all() and expected.std() > 0.01
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected), (at, (found - expected).abs().max())
            assert cache.get_seq_length() == length + count


@torch.inference_mode()
def take_in_passes(
    one: Callable[..., torch.Tensor],
    several: Callable[..., Sequence[torch.Tensor]],
    model: Any,
    known: int,
    passes: Sequence[tuple[int, int]],
    seed: int,
) -> None:
    """After ``known`` tokens, whose keys and values are random, go on in passes that are so wide, of whose
    tokens so many are kept and the others refused; and by single tokens. Logits of what is kept, and keys
    and values, are the same to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, count = model.config.vocab_size, sum(kept for _, kept in passes)
    text = torch.randint(vocabulary, (1, known + count), generator=generator).to(model.device)
    # As many first tokens as are cheap give memory its shape; what the others left is drawn.
    first = min(known, 16)
    caches = [make_cache(model.config.num_hidden_layers, known) for _ in range(2)]
    for cache in caches:
        model(input_ids=text[:, :first], **as_argument(cache), use_cache=True, logits_to_keep=1)
    for alone, wide in zip(*map(past, caches), strict=True):
        assert alone.memory is not None and wide.memory is not None
        for mine, theirs in zip(alone.memory, wide.memory, strict=True):
            drawn = torch.randn(mine.shape, generator=generator)
            mine.copy_(drawn)
            theirs.copy_(drawn)
        alone.set_length(known)
        wide.set_length(known)
    alone, wide = caches
    at = known
    for width, kept in passes:
        refused = torch.randint(vocabulary, (1, width - kept), generator=generator)
        tokens = torch.cat([text[:, at : at + kept], refused.to(model.device)], dim=1)
        reserve(wide, at + width)
        found = [logits.clone() for logits in several(tokens, wide)]
        assert len(found) == width and wide.get_seq_length() == at + width
        for layer in past(wide):
            layer.set_length(at + kept)
        for place in range(kept):
            reserve(alone, at + 1)
            expected = one(text[:, at : at + 1], alone)
            assert expected.isfinite().all() and expected.std() > 0.01
            assert torch.equal(found[place], expected), (at, width, place)
            at += 1
    for mine, theirs in zip(past(alone), past(wide), strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        assert mine.keys.shape[2] == at
