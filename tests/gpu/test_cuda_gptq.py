"""GPTQ on the GPU comes out as on the CPU, but for the order in which a device adds up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import int4
from demo import tokenizer
from feeder.calibration import calibrated
from feeder.checkpoints.recognize import open_source
from feeder.gptq import Curvature, gptq
from feeder.layerwise import of_source
from feeder.quantize import quantize_checkpoint
from feeder.texts import Excerpt
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.gpu


def product_error(
    weight: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor
) -> float:
    back = int4.dequantize(*packed, weight.shape, torch.float32)
    return float((x @ (weight - back).T).square().sum())


@pytest.mark.parametrize("shape", [(512, 1024), (300, 200)])
def test_a_weight_comes_out_as_good_as_on_the_cpu(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(shape[1], shape[1], generator=generator)
    mix *= torch.logspace(0, -1.5, shape[1])[:, None]
    x = torch.randn(3000, shape[1], generator=generator) @ mix
    weight = torch.randn(shape, generator=generator)
    hessian = x.T @ x
    on_gpu, on_cpu = Curvature.of(hessian.cuda()), Curvature.of(hessian)
    assert on_cpu is not None and on_gpu is not None
    found = gptq(weight.cuda(), on_gpu)
    assert all(not tensor.is_cuda for tensor in found)
    errors = [product_error(weight, packed, x) for packed in (gptq(weight, on_cpu), found)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_a_model_is_calibrated_on_the_gpu(tmp_path: Path) -> None:

    model = make_checkpoint(tmp_path / "model", hidden=128, intermediate=384, vocab=320)
    tokenizer.build().save_pretrained(model)
    excerpt = Excerpt(None, 4096, 256, measured=False)
    store = quantize_checkpoint(
        model, tmp_path / "store", "cuda", progress=False, method="gptq", calibration=excerpt
    )
    assert store.method == "gptq" and len(store.weights) == 15


def test_factors_come_from_the_host_where_the_gpu_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    model = make_checkpoint(tmp_path / "model", hidden=128, intermediate=384, vocab=320)
    tokenizer.build().save_pretrained(model)
    source = open_source(model)
    rows = Excerpt(None, 2048, 256, measured=False).rows(model, source.config)
    expected = list(calibrated(source, rows, torch.device("cuda"), lambda: None))
    original, moved = torch.linalg.cholesky_ex, []

    def full(matrix: torch.Tensor) -> object:
        if matrix.is_cuda:
            raise torch.OutOfMemoryError("no room")
        moved.append(matrix.shape)
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", full)
    found = list(calibrated(source, rows, torch.device("cuda"), lambda: None))
    assert moved and [name for name, _, _ in found] == [name for name, _, _ in expected]
    weights = of_source(source, torch.device("cpu"), torch.float32)
    for (name, *packed), (_, *there) in zip(found, expected, strict=True):
        weight = weights(f"{name}.weight")
        one, other = (
            int4.dequantize(codes, scales, weight.shape, torch.float32)
            for codes, scales in (packed, there)
        )
        # Another factorization rounds otherwise: here and there a code turns over, and then those of
        # the layers behind it do. So the first weights are the same, and all are as good.
        if name.endswith("layers.0.self_attn.q_proj"):
            assert float((one == other).float().mean()) > 0.99
        errors = [float((values - weight).norm()) for values in (one, other)]
        assert errors[0] == pytest.approx(errors[1], rel=0.05), name
