"""Ready-made INT4 checkpoints, written bit by bit from the layouts as they are published.

Numbers are put into words one at a time, by arithmetic on Python's integers, and values are worked out one
formula at a time: slow, obvious, and with nothing in common with the readers that are tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from common.families import expected_tensors
from tests.checkpoints import load_tensors, make_checkpoint

#: What the tests' models are like: all columns are multiples of 128.
SIZES: dict[str, Any] = {
    "hidden": 128,
    "intermediate": 256,
    "layers": 1,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 96,
}


@dataclass(frozen=True)
class Weight:
    """numbers, 0...15, [N, K]; zeros, 0...15, and scales [N, G]; groups: the group of each column."""

    numbers: np.ndarray
    zeros: np.ndarray
    scales: torch.Tensor
    groups: np.ndarray

    def values(self) -> torch.Tensor:
        """(number - zero) * scale, fp32 [N, K]: exact for scales of 16 bits."""
        index = torch.from_numpy(self.groups)
        differences = torch.from_numpy(self.numbers - self.zeros[:, self.groups]).float()
        return differences * self.scales.float()[:, index]


def random_weight(
    shape: tuple[int, int],
    seed: int,
    group: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    asymmetric: bool = False,
    shuffled: bool = False,
) -> Weight:
    rows, columns = shape
    generator = np.random.default_rng(seed)
    count = -(-columns // group)
    zeros = generator.integers(1, 16, (rows, count)) if asymmetric else np.full((rows, count), 8)
    scales = torch.from_numpy(generator.uniform(0.002, 0.02, (rows, count))).to(dtype)
    groups = np.arange(columns) // group
    if shuffled:
        generator.shuffle(groups)
    return Weight(generator.integers(0, 16, shape), zeros, scales, groups)


def words(numbers: list[int]) -> int:
    """Eight numbers in a word, the first in its lowest bits, as a signed int32."""
    assert len(numbers) == 8 and all(0 <= number <= 15 for number in numbers)
    word = sum(number * 16**place for place, number in enumerate(numbers))
    return word - (1 << 32) if word >= 1 << 31 else word


def packed_down(matrix: np.ndarray) -> torch.Tensor:
    """[R, C] to int32 [R / 8, C]: eight rows of a column in each word."""
    rows, columns = matrix.shape
    return torch.tensor(
        [[words(matrix[r : r + 8, c].tolist()) for c in range(columns)] for r in range(0, rows, 8)],
        dtype=torch.int32,
    )


def packed_across(matrix: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[R, C] to int32 [R, C / 8]: eight columns of a row in each word, in the order given."""
    rows, columns = matrix.shape
    return torch.tensor(
        [
            [words([int(matrix[r, c + place]) for place in order]) for c in range(0, columns, 8)]
            for r in range(rows)
        ],
        dtype=torch.int32,
    )


def gptq(weight: Weight, version: str = "gptq") -> dict[str, torch.Tensor]:
    """The tensors of a weight in a GPTQ checkpoint of either version."""
    zeros = weight.zeros.T if version == "gptq_v2" else (weight.zeros.T - 1) % 16
    return {
        "qweight": packed_down(weight.numbers.T),
        "qzeros": packed_across(zeros),
        "scales": weight.scales.T.contiguous(),
        "g_idx": torch.from_numpy(weight.groups).int(),
    }


def awq(weight: Weight) -> dict[str, torch.Tensor]:
    """The tensors of a weight in an AWQ checkpoint of the layout gemm."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": packed_across(weight.numbers.T, order),
        "qzeros": packed_across(weight.zeros.T, order),
        "scales": weight.scales.T.contiguous(),
    }


def write(
    path: Path,
    settings: Mapping[str, Any] | None,
    make: Callable[[tuple[int, int], int], Weight],
    encode: Callable[[Weight], dict[str, torch.Tensor]],
    head: bool = False,
    **sizes: Any,
) -> dict[str, torch.Tensor]:
    """Make a checkpoint in which `encode` has stored the Linears that `make` makes; returns the values of all
    tensors, by their names in the original. `head`: lm_head too, which is left as it is otherwise."""
    make_checkpoint(path, **(SIZES | sizes), dtype=torch.float16)
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path).items()}
    config = json.loads((path / "config.json").read_text())
    values = dict(tensors)
    for seed, (name, shape) in enumerate(expected_tensors(config)[0].items()):
        if name == "lm_head" and not head:
            continue
        weight = make(shape, seed)
        values[f"{name}.weight"] = weight.values()
        del tensors[f"{name}.weight"]
        for what, tensor in encode(weight).items():
            tensors[f"{name}.{what}"] = tensor.contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if settings is not None:
        config["quantization_config"] = dict(settings)
        (path / "config.json").write_text(json.dumps(config))
    return values
