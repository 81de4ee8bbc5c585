"""Ready-made checkpoints become the same store on the GPU as on the CPU, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from feeder.quantize import quantize_checkpoint
from tests.ready_made import Weight, awq, gptq, random_weight, write

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
KINDS: dict[str, tuple[dict[str, Any], Callable[..., Weight], Callable[..., Any]]] = {
    "gptq": (GPTQ, partial(random_weight, group=64, shuffled=True, asymmetric=True), gptq),
    "awq": (AWQ, partial(random_weight, dtype=torch.float16, asymmetric=True), awq),
}


def same_on_both(model: Path, path: Path) -> None:
    stores = [
        quantize_checkpoint(model, path / device, device, progress=False)
        for device in ("cpu", "cuda")
    ]
    assert stores[0].fingerprint == stores[1].fingerprint


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_packed(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "model", *KINDS[kind])
    same_on_both(tmp_path / "model", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_0"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")  # an extra, which a machine with a GPU need not have
    from tests.checkpoints import make_checkpoint
    from tests.gguf_files import all_as, write_gguf

    checkpoint = make_checkpoint(tmp_path / "model", hidden=128, intermediate=256)
    write_gguf(tmp_path / "x.gguf", checkpoint, all_as(gguf.GGMLQuantizationType[kind]))
    same_on_both(tmp_path / "x.gguf", tmp_path)
