"""What happens when device memory is short: prompts are split, the feeder is asked for some of its slots'.

Nothing of this changes the text, but for the rounding of a prompt that is taken in several passes.
Knows transformers' cache of keys and values, and nothing of slots.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from common.config import parse_size
from common.errors import MemoryShortageError, UsageError
from common.footprint import (
    PASS_STEP,
    WORKSPACE_BYTES,
    activation_bytes,
    kv_bytes,
    masked_bytes,
    pass_tokens,
    prompt_bytes,
    scratch_bytes,
    split_bytes,
)
from common.log import log
from common.memory import Memory
from common.shortages import shortages
from engine.cache import CACHE_ARGUMENT, PastLayer
from engine.client import WeightClient
from engine.packed import MAX_FUSED_TOKENS

ATTEMPTS = 4
LEAST_BYTES = 512 << 20  # a shrink empties all slots once: not for less
#: A prompt that is longer than planned takes slots' memory for passes of so many tokens, not of more:
#: what slots lose they lose for good, while another pass streams the store once.
LONG_PROMPT_PASS = 4 * PASS_STEP


class MemoryKeeper:
    """Looks after one model's memory. From its making on a pass that runs out of it is made again."""

    def __init__(self, model: PreTrainedModel, client: WeightClient, memory: Memory) -> None:
        self._client, self._memory = client, memory
        self._config = model.config.to_dict()
        self._itemsize = model.dtype.itemsize
        self._made = False  # whether what wide passes allocate once, for good, is there
        self._forward = model.forward

        @functools.wraps(model.forward)  # ``generate`` looks at its signature
        def forward(*arguments: Any, **named: Any) -> Any:
            return self._forward_pass(*arguments, **named)

        model.forward = forward

    def chunk(self, tokens: int, capacity: int = 0, known: int = 0) -> int | None:
        """How many of a prompt's ``tokens`` a pass may take; None if all of them. Slots give what the
        prompt needs and the engine has not. ``capacity``: for so many there is a KV cache already.
        ``known``: the first so many are in it, and in no pass."""
        config, itemsize = self._config, self._itemsize
        least = kv_bytes(config, tokens, itemsize)
        whole = prompt_bytes(config, tokens, known, itemsize)
        least += min(whole, split_bytes(config, tokens, LONG_PROMPT_PASS, itemsize))
        kept = kv_bytes(config, min(tokens, capacity), itemsize)
        missing = least - kept - self._room_bytes()
        if missing > 0:
            self._client.shrink(max(missing, LEAST_BYTES))
        found = pass_tokens(config, tokens, itemsize, self._room_bytes() + kept, known)
        if found >= tokens - known:
            return None
        log.info("memory is short: the prompt of %d tokens is taken %d at a time", tokens, found)
        return found

    def fits(self, tokens: int, rows: int, sequences: int, piece: tuple[int, int] = (0, 0)) -> bool:
        """Whether a KV cache of ``tokens`` more and a pass of so many rows, of so many sequences, find
        room beside the slots as they are. ``piece``: rows of the largest piece of a prompt in it, and
        the tokens of that prompt, for which there is a mask."""
        need = kv_bytes(self._config, tokens, self._itemsize)
        need += activation_bytes(self._config, rows, self._itemsize, sequences)
        need += masked_bytes(self._config, *piece, self._itemsize)
        return need <= self._room_bytes()

    def _room_bytes(self) -> int:
        """What passes and a KV cache may take."""
        room = self._memory.room_bytes()
        if self._made or self._memory.device.type == "cpu":
            return room
        room -= WORKSPACE_BYTES
        if self._client.packed:
            largest = max(self._config["vocab_size"], self._config["intermediate_size"])
            room -= scratch_bytes(largest * self._config["hidden_size"], self._itemsize)
        return room

    def _forward_pass(self, *arguments: Any, **named: Any) -> Any:
        cache, ids = named.get(CACHE_ARGUMENT), named.get("input_ids")
        found = self.survive(lambda: self._forward(*arguments, **named), cache)
        if ids is not None and ids.numel() > MAX_FUSED_TOKENS:
            self._made = True
        return found

    def survive(self, call: Callable[[], Any], cache: Any) -> Any:
        """Make the call, which adds to ``cache``, again and again until memory suffices."""
        length = 0 if cache is None else cache.get_seq_length()
        attempt = 0
        while True:
            try:
                with shortages():
                    return call()
            except torch.OutOfMemoryError as error:
                reason = str(error)
            # Not in the except clause: until it ends, the traceback holds the tensors of the pass.
            if attempt == ATTEMPTS or (cache is not None and not _roll_back(cache, length)):
                raise shortage(reason)
            if self._memory.device.type == "cuda":
                torch.cuda.empty_cache()
            wanted = max(LEAST_BYTES, failed_bytes(reason)) << attempt
            if not self._client.shrink(wanted):
                raise shortage(reason)
            attempt += 1


def shortage(reason: str) -> MemoryShortageError:
    """The one line for a run that ends for want of memory. ``reason``: torch's own words."""
    first, second = [*reason.split(". "), "", ""][:2]
    reason = f"{first}. {second}" if second.startswith("Tried to allocate") else first
    return MemoryShortageError(
        f"the engine is out of device memory ({reason.rstrip('.')}) and the slots cannot make room:"
        " give a shorter prompt, more --vram, or a device with more memory"
    )


def failed_bytes(reason: str) -> int:
    """How much torch tried to allocate, by its error's words; 0 if they do not say."""
    found = re.search(r"Tried to allocate ([\d.]+ [A-Za-z]+)", reason)
    try:
        return parse_size(found[1]) if found else 0
    except UsageError:
        return 0


def _roll_back(cache: Any, length: int) -> bool:
    """Drop what a pass that failed half-way has added; whether that can be done."""
    for layer in cache.layers:
        if not isinstance(layer, PastLayer):
            return False
        if layer.is_initialized and layer.get_seq_length() > length:
            layer.set_length(length)
    return True
