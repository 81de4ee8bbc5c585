"""Steps compared with transformers' own forward pass, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.cache import make_cache, reserve

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
            model(**prompt, past_key_values=cache)
            theirs = reference(**prompt).past_key_values
            for at in range(length, length + count):
                token = ids[:, at : at + 1]
                reserve(cache, at + 1)
                found = step(token, cache)
                output = reference(input_ids=token, past_key_values=theirs, use_cache=True)
                expected = output.logits[:, -1]
                assert expected.isfinite().all() and expected.std() > 0.01
                assert found.dtype == expected.dtype
                assert torch.equal(found, expected), (at, (found - expected).abs().max())
            assert cache.get_seq_length() == length + count
