"""Sums as tensors: rows of token ids to train on, and what of them is scored.

Owns the length of a row and the split of the drawing over processes. Knows nothing of models.
"""

from __future__ import annotations

import math
import multiprocessing
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo import sums
from demo.tokenizer import build, prompt_and_completion

LENGTH = 128  # the longest sum has 127 tokens in the longer form
IGNORED = -100
_CHUNK = 10_000


def draw_rows(seed: int, count: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of `count` random sums, a quarter of them striking, in both prompt forms.

    Returns (rows int16 [count, LENGTH], padded at the end, and prompt lengths int16 [count]).
    """
    rng, tokenizer = random.Random(seed), build()
    pairs = []
    for _ in range(count):
        item = sums.draw(rng, held_out, striking=rng.random() < 0.25)
        pairs.append(prompt_and_completion(tokenizer, item, chat=rng.random() < 0.5))
    prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False)["input_ids"]
    completions = tokenizer([c for _, c in pairs], add_special_tokens=False)["input_ids"]
    rows = np.full((count, LENGTH), tokenizer.pad_token_id, dtype=np.int16)
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        row[: len(prompt) + len(completion)] = prompt + completion
    return rows, np.array([len(prompt) for prompt in prompts], dtype=np.int16)


def draw_pool(seed: int, count: int, workers: int) -> tuple[Tensor, Tensor]:
    """Rows to train on, at least `count`, drawn by processes.

    Drawn once and then picked from at random, so that the device never waits for a batch. Call it
    before CUDA is touched: the processes are forks.
    """
    jobs = [(seed * 1_000_003 + job, _CHUNK, False) for job in range(math.ceil(count / _CHUNK))]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        chunks = pool.starmap(draw_rows, jobs, chunksize=1)
    rows, starts = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    return torch.from_numpy(rows), torch.from_numpy(starts)


def inputs_and_targets(rows: Tensor, starts: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, LENGTH], and the next token at each place that is scored, else IGNORED.

    Only the completion is scored, its end token included: a prompt cannot be predicted.
    """
    ids = rows.long()
    targets = F.pad(ids[:, 1:], (0, 1), value=pad)
    following = torch.arange(1, LENGTH + 1, device=rows.device)
    scored = (following >= starts[:, None]) & (targets != pad)
    return ids, targets.where(scored, IGNORED)
