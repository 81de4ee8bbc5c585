"""What a model takes in device memory beside its weights: KV cache and activations, from its config.

Arithmetic on a parsed config, shared by the feeder, which plans with it, and the engine, which splits
a long prompt by it. Knows no torch and no device. Sizes are of one sequence where nothing else is said.
"""

from __future__ import annotations

from typing import Any

from common.families import attention_widths, windows

#: What cuBLAS takes once, for good, however short the passes: two workspaces of 32 MiB.
WORKSPACE_BYTES = 64 << 20
#: Of packed weights the engine dequantizes so much at once: the largest matrix of a 32B model,
#: 27648 x 5120, as bf16 270 MiB.
SCRATCH_ELEMENTS = 27648 * 5120
#: A prompt is split into passes of whole multiples of this; shorter ones would not use the device.
PASS_STEP = 256
DEFAULT_CONTEXT = 32768  # transformers' own for a config that names none
PLANNED_CONTEXT = 4096  # tokens that memory is kept for, if the model takes so many
PLANNED_SHARE = 1024  # of each sequence, where there are many


def model_context(config: dict[str, Any]) -> int:
    """The most tokens that the model takes."""
    return int(config.get("max_position_embeddings") or DEFAULT_CONTEXT)


def kv_bytes(config: dict[str, Any], tokens: int, itemsize: int) -> int:
    """Keys and values of ``tokens`` tokens in all layers."""
    _, key_value = attention_widths(config)
    return 2 * int(config["num_hidden_layers"]) * key_value * tokens * itemsize


def activation_bytes(config: dict[str, Any], tokens: int, itemsize: int, sequences: int = 1) -> int:
    """The most that a pass of ``tokens`` tokens has allocated at once, KV cache left out.

    Counts the tensors that live together in transformers' layers with an attention that makes no
    matrix of scores. Logits are of each sequence's last token only, as ``generate`` asks for them; they
    are sampled one after the other.
    """
    others = (sequences - 1) * int(config["vocab_size"]) * 4
    return (
        _unmasked_bytes(config, tokens, itemsize) + _mask_bytes(config, tokens, itemsize) + others
    )


def _mask_bytes(config: dict[str, Any], tokens: int, itemsize: int) -> int:
    """What a pass takes for masks of its own accord: those of sliding windows that it reaches beyond."""
    if not any(window is not None and window <= tokens for window in windows(config)):
        return 0
    return masked_bytes(config, tokens, tokens, itemsize)


def masked_bytes(config: dict[str, Any], queries: int, keys: int, itemsize: int) -> int:
    """An attention with a mask: the mask, and then torch wants keys and values for every head."""
    query, _ = attention_widths(config)
    return queries * keys * (1 + itemsize) + 2 * keys * query * itemsize


def _unmasked_bytes(config: dict[str, Any], tokens: int, itemsize: int) -> int:
    hidden, middle = int(config["hidden_size"]), int(config["intermediate_size"])
    query, key_value = attention_widths(config)
    mlp = 3 * middle * itemsize  # act(gate), up and their product
    # q, k, v, both rotated, in halves and sums; then keys and values once more as they are appended
    attention = (6 * query + 8 * key_value) * itemsize
    norm = 3 * hidden * 4  # computed in float32
    stream = 2 * hidden * itemsize  # the residual and what the block was given
    logits = 8 * int(config["vocab_size"]) * 4  # in float32, sorted and summed up by the sampling
    return tokens * (max(mlp, attention, norm) + stream) + logits


def scratch_bytes(largest_elements: int, itemsize: int) -> int:
    """What the engine dequantizes packed weights into, the largest of which has so many elements. It is
    taken with the first pass of many tokens, for good."""
    return min(SCRATCH_ELEMENTS, largest_elements) * itemsize


def kept_tokens(config: dict[str, Any], context: int | None, sequences: int) -> int:
    """For how many tokens of all sequences together a KV cache is planned.

    ``context``: of each, if it was asked for. If not, more sequences are taken to be shorter ones.
    """
    most = model_context(config)
    if context is not None:
        return sequences * min(context, most)
    return max(min(PLANNED_CONTEXT, most), sequences * min(PLANNED_SHARE, most))


def pass_tokens(
    config: dict[str, Any], tokens: int, itemsize: int, room_bytes: int, known: int = 0
) -> int:
    """How many of a prompt's ``tokens``, less the ``known`` ones, one pass can take in ``room_bytes``, KV
    cache of the whole prompt included. Never less than ``PASS_STEP``: who runs out of memory then needs
    more of it."""
    room_bytes -= kv_bytes(config, tokens, itemsize)
    if prompt_bytes(config, tokens, known, itemsize) <= room_bytes:
        return tokens - known
    fixed = split_bytes(config, tokens, 0, itemsize)
    step = split_bytes(config, tokens, PASS_STEP, itemsize) - fixed
    return min(tokens - known, max(1, (room_bytes - fixed) // step) * PASS_STEP)


def prompt_bytes(config: dict[str, Any], tokens: int, known: int, itemsize: int) -> int:
    """As `activation_bytes`, for one pass over a prompt whose first ``known`` tokens are in the KV cache."""
    if not known:
        return activation_bytes(config, tokens, itemsize)
    return split_bytes(config, tokens, tokens - known, itemsize)


def split_bytes(config: dict[str, Any], tokens: int, chunk: int, itemsize: int) -> int:
    """As `activation_bytes`, for a pass of ``chunk`` of a prompt's ``tokens``, the others before it."""
    masked = masked_bytes(config, chunk, tokens, itemsize)
    return _unmasked_bytes(config, chunk, itemsize) + masked
