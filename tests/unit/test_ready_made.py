"""GPTQ and AWQ checkpoints become stores: what is kept bit for bit, what is not, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import int4
from common.checkpoint_fingerprint import checkpoint_fingerprint
from common.errors import CheckpointError
from common.log import log
from common.store import Store
from feeder import methods
from feeder.checkpoints.awq import Awq
from feeder.checkpoints.gptq import Gptq
from feeder.checkpoints.recognize import open_source
from feeder.convert import Tally, convert
from feeder.quantize import quantize_checkpoint
from tests.checkpoints import edit_config, edit_tensors
from tests.ready_made import SIZES, Weight, awq, gptq, random_weight, write

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
CPU = torch.device("cpu")
SMALL = {name: size for name, size in SIZES.items() if name != "layers"} | {"layers": 1}


def quantize(model: Path, method: str = "absmax") -> Store:
    """A store made from `model`, in a directory beside it."""
    return quantize_checkpoint(
        model, model.with_name(f"{model.name}-store"), "cpu", progress=False, method=method
    )


def stored(store: Store) -> dict[str, torch.Tensor]:
    """What the store's weights are, dequantized by the reference in fp32."""
    found = {}
    for entry in store.weights:
        codes, scales = store.read_weight(entry)
        store.check(entry, codes, scales)
        found[f"{entry.name}.weight"] = int4.dequantize(codes, scales, entry.shape, torch.float32)
    return found


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error, Frobenius."""
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _log_is_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", log.name)


# What is exact

EXACT: dict[str, tuple[dict[str, Any], Callable[..., Weight], Callable[..., Any]]] = {
    "gptq": (GPTQ, random_weight, gptq),
    "gptq_v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        random_weight,
        partial(gptq, version="gptq_v2"),
    ),
    "gptq, one group a row": (
        GPTQ | {"group_size": -1},
        lambda shape, seed: random_weight(shape, seed, group=shape[1]),
        gptq,
    ),
    "gptq, without g_idx": (
        GPTQ,
        random_weight,
        lambda weight: {k: v for k, v in gptq(weight).items() if k != "g_idx"},
    ),
    "gptq, desc_act whose groups are in order": (GPTQ | {"desc_act": True}, random_weight, gptq),
    "awq, zero points 8": (AWQ, random_weight, awq),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_fits_is_kept_bit_for_bit(tmp_path: Path, name: str) -> None:
    settings, make, encode = EXACT[name]
    values = write(tmp_path / "model", settings, make, encode)
    store = quantize(tmp_path / "model")
    found = stored(store)
    for weight, expected in values.items():
        if weight in found and weight != "lm_head.weight":
            assert found[weight].equal(expected), weight
    # What was not packed is quantized by the method, as in any checkpoint.
    codes, scales = int4.quantize(values["lm_head.weight"])
    head = next(entry for entry in store.weights if entry.name == "lm_head")
    assert all(a.equal(b) for a, b in zip(store.read_weight(head), (codes, scales), strict=True))
    for kept in store.residents:
        assert store.read_resident(kept).equal(values[kept.name])
    assert store.source_format == settings["quant_method"]
    assert "quantization_config" not in store.config
    assert Store.open(store.path).source_format == store.source_format


def test_a_head_that_is_packed_too(tmp_path: Path) -> None:
    values = write(tmp_path / "model", GPTQ | {"lm_head": True}, random_weight, gptq, head=True)
    found = stored(quantize(tmp_path / "model"))
    assert found["lm_head.weight"].equal(values["lm_head.weight"])


def test_zero_points_of_7_are_kept_by_negated_scales(tmp_path: Path) -> None:
    def make(shape: tuple[int, int], seed: int) -> Weight:
        weight = random_weight(shape, seed)
        return Weight(weight.numbers, np.full_like(weight.zeros, 7), weight.scales, weight.groups)

    values = write(tmp_path / "model", AWQ, make, awq)
    store = quantize(tmp_path / "model")
    for name, expected in values.items():
        if name.endswith("_proj.weight"):
            assert stored(store)[name].equal(expected)
    scales = store.read_weight(store.weights[0])[1]
    assert bool((scales < 0).any())


def test_a_group_is_no_larger_than_its_row() -> None:
    """A size from a file must not decide how much memory is taken."""
    shape, size = (16, 256), 1 << 12
    weight = random_weight(shape, 3, group=256)
    for layout, tensors in (
        (Gptq(GPTQ | {"group_size": size}, "here"), gptq(weight)),
        (Awq(AWQ | {"group_size": size}, "here"), awq(weight)),
    ):
        prepared = layout.prepare(tensors, shape)
        assert prepared[1].size == shape[1]
        piece = layout.rows(prepared, 0, 16)
        assert piece.values().equal(weight.values().reshape(-1))


# What is not exact


def test_fp16_scales_keep_their_codes_and_are_rounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = partial(random_weight, dtype=torch.float16)
    values = write(tmp_path / "model", GPTQ, make, gptq)
    found = stored(quantize(tmp_path / "model"))
    for name, expected in values.items():
        if name.endswith("_proj.weight"):
            assert not found[name].equal(expected)
            assert bool(((found[name] - expected).abs() <= expected.abs() * 2.0**-8).all())
            assert off(found[name], expected) < 0.002
    said = caplog.messages[-1]
    assert "with the same codes and the scale rounded to bf16; relative error" in said
    assert "quantized again" not in said


@pytest.mark.parametrize(
    ("settings", "make", "encode"),
    [
        (
            GPTQ | {"desc_act": True, "group_size": 64},
            partial(random_weight, group=64, shuffled=True),
            gptq,
        ),
        (GPTQ | {"sym": False}, partial(random_weight, asymmetric=True), gptq),
        (AWQ, partial(random_weight, asymmetric=True), awq),
        (GPTQ | {"group_size": 32}, partial(random_weight, group=32), gptq),
    ],
    ids=["desc_act", "asymmetric", "awq", "groups of 32"],
)
def test_what_does_not_fit_is_quantized_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    make: Callable[[tuple[int, int], int], Weight],
    encode: Callable[[Weight], dict[str, torch.Tensor]],
) -> None:
    values = write(tmp_path / "model", settings, make, encode, **SMALL)
    store = quantize(tmp_path / "model", "absmax")
    found = stored(store)
    again = kept = 0
    for entry in store.weights[:-1]:
        expected = values[f"{entry.name}.weight"]
        wanted = int4.quantize(expected, methods.rule("absmax"))
        wanted_values = int4.dequantize(*wanted, entry.shape, torch.float32)
        # Each block is either what the method makes of its values, or those values themselves.
        blocks = (found[f"{entry.name}.weight"], wanted_values, expected)
        one, other, value = (block.view(-1, 128) for block in blocks)
        same = (one == value).all(dim=1)
        again += int(((one == other).all(dim=1) & ~same).sum())
        kept += int(same.sum())
    assert again + kept == sum(entry.elements for entry in store.weights[:-1]) // 128
    assert again > kept
    said = caplog.messages
    settled = next(line for line in said if "converted from" in line)
    share = f"{again / (again + kept):.1%} quantized again by absmax"
    assert share in settled and "relative error of these weights 0.0" in settled


def test_the_measured_error_is_that_of_the_weights(tmp_path: Path) -> None:
    weight = random_weight((16, 256), 3, asymmetric=True, dtype=torch.float16)
    layout = Awq(AWQ, "here")
    piece = layout.rows(layout.prepare(awq(weight), (16, 256)), 0, 16)
    tally = Tally()
    packed = convert(piece, methods.rule("weighted"), tally)
    found = int4.dequantize(*packed, (16, 256), torch.float32)
    assert tally.error == pytest.approx(off(found, weight.values()), rel=1e-5)
    assert (tally.blocks, tally.exact + tally.rounded + tally.again) == (32, 32)


# Layouts, by any numbers


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_layouts_are_read_as_they_are_published(data: st.DataObject) -> None:
    rows, columns = (8 * data.draw(st.integers(1, 4)) for _ in range(2))
    group = data.draw(st.sampled_from([8, 16, 32, columns]))
    seed = data.draw(st.integers(0, 1 << 30))
    kind = data.draw(st.sampled_from(["gptq", "gptq_v2", "awq"]))
    shuffled = kind != "awq" and data.draw(st.booleans())
    shape = (rows, columns)
    weight = random_weight(shape, seed, group, torch.float16, asymmetric=True, shuffled=shuffled)
    layout: Gptq | Awq
    if kind == "awq":
        layout, tensors = Awq(AWQ | {"group_size": group}, "here"), awq(weight)
    else:
        layout = Gptq(GPTQ | {"group_size": group, "checkpoint_format": kind}, "here")
        tensors = gptq(weight, kind)
    for what, expected in layout.expected(shape).items():
        assert tuple(tensors[what].shape) == expected.shape
    prepared = layout.prepare(tensors, shape)
    first = 8 * data.draw(st.integers(0, rows // 8 - 1))
    last = 8 * data.draw(st.integers(first // 8 + 1, rows // 8))
    piece = layout.rows(prepared, first, last)
    assert piece.values().equal(weight.values()[first:last].reshape(-1))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.sampled_from([1, 4, 32, 128]), st.integers(0, 1 << 30))
def test_blocks_hold_what_they_say(count: int, run: int, seed: int) -> None:
    """Of any integers: exact blocks read back exactly, and all are counted, also a short last one."""
    from feeder.checkpoints.source import Grouped

    generator = torch.Generator().manual_seed(seed)
    low = int(torch.randint(-12, -4, (), generator=generator))
    integers = torch.randint(low, low + 16, (count * run,), generator=generator).to(torch.int8)
    scales = torch.randn(1 if seed % 2 else count, generator=generator).bfloat16().float()
    scales = scales.expand(count).contiguous()
    piece = Grouped(integers, scales, run)
    tally = Tally()
    packed = convert(piece, int4.absmax, tally)
    found = int4.dequantize(*packed, (count * run,), torch.float32)
    same = sum(
        bool(one.equal(other))
        for one, other in zip(found.split(128), piece.values().split(128), strict=True)
    )
    assert tally.rounded == 0
    assert tally.exact <= same
    assert tally.blocks == -(-count * run // 128)
    if seed % 2 and low >= -8 and low + 15 <= 8:
        assert tally.exact == tally.blocks


# Refusals

PACK_QUANTIZED = {
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "eight bits": ({"bits": 8}, "bits is 8, expected 4"),
    "bits of another type": ({"bits": True}, "bits is True, expected 4"),
    "marlin": ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', expected 'gptq'"),
    "group size": ({"group_size": 0}, "group_size is 0, expected -1 or a number"),
    "desc_act": ({"desc_act": "yes"}, "desc_act is 'yes', expected True or False"),
    "method": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', expected one of"),
    "no method": ({"quant_method": None}, "quant_method is None, expected one of gptq, awq"),
    "awq for gemv": ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv', expected"),
    "group of another size": (
        {"group_size": 64},
        r"qzeros is I32 \[1, 16\], expected I32 \[2, 16\]",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ready") / "model"
    write(path, GPTQ, random_weight, gptq)
    return path


def copy_of(checkpoint: Path, path: Path) -> Path:
    path.mkdir()
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        quantize(path)
    assert "\n" not in str(caught.value)
    assert not path.with_name(f"{path.name}-store").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_understood(checkpoint: Path, tmp_path: Path, name: str) -> None:
    changes, match = REFUSED[name]
    model = copy_of(checkpoint, tmp_path / "model")
    edit_config(model, quantization_config=GPTQ | changes)
    refused(model, match)


Q_PROJ = "model.layers.0.self_attn.q_proj"
DAMAGED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing scales": (lambda t: t.pop(f"{Q_PROJ}.scales"), f"lacks {Q_PROJ}.scales, which its"),
    "missing weight": (lambda t: t.pop(f"{Q_PROJ}.qweight"), f"lacks {Q_PROJ}.weight"),
    "scales of another dtype": (
        lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"].double()}),
        "scales is F64",
    ),
    "group out of range": (
        lambda t: t[f"{Q_PROJ}.g_idx"].__setitem__(5, 7),
        f"{Q_PROJ}: found groups 0 to 7 in its index of groups, expected 0 to 0",
    ),
    "a scale of infinity": (
        lambda t: t[f"{Q_PROJ}.scales"].__setitem__((0, 3), torch.inf),
        f"{Q_PROJ}.weight: found a scale that is NaN or Inf",
    ),
    "a bias that models of this kind lack": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(256)}),
        "up_proj.bias is not zero",
    ),
    "a bias of another dtype that models of this kind lack": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(256).double()}),
        "up_proj.bias is F64, expected one of",
    ),
    "a tensor of no model": (
        lambda t: t.update({f"{Q_PROJ}.qsomething": torch.ones(1)}),
        "q_proj.qsomething', which",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tensors(checkpoint: Path, tmp_path: Path, name: str) -> None:
    edit, match = DAMAGED[name]
    model = copy_of(checkpoint, tmp_path / "model")
    edit_tensors(model, edit)
    refused(model, match)


def test_awq_is_what_its_own_library_packs_and_dequantizes() -> None:
    """AutoAWQ, where it is installed: it asks for packages that nothing else here needs."""
    gemm = pytest.importorskip("awq.modules.linear.gemm", exc_type=ImportError)
    from awq.utils.packing_utils import dequantize_gemm

    shape = (64, 256)
    weight = random_weight(shape, 3, dtype=torch.float16, asymmetric=True)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = weight.values()
    zeros = torch.from_numpy(weight.zeros).float()
    packed = gemm.WQLinear_GEMM.from_linear(
        linear, 4, 128, scales=weight.scales.T.float().contiguous(), zeros=zeros.T.contiguous()
    )
    tensors = {what: getattr(packed, what).cpu() for what in ("qweight", "qzeros", "scales")}
    layout = Awq({"bits": 4, "group_size": 128}, "here")
    ours = layout.rows(layout.prepare(tensors, shape), 0, shape[0]).values().view(shape)
    assert ours.equal(weight.values())
    theirs = dequantize_gemm(*tensors.values(), 4, 128).T
    assert ours.half().equal(theirs)


@pytest.mark.parametrize(("written", "claimed"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_the_other_version_is_not_taken_for_what_it_says(
    tmp_path: Path, written: str, claimed: str
) -> None:
    settings = GPTQ | {"checkpoint_format": claimed}
    write(tmp_path / "model", settings, random_weight, lambda weight: gptq(weight, written))
    refused(tmp_path / "model", f"set checkpoint_format to '{written}' in its settings")


@pytest.mark.parametrize(
    "settings", [None, {"quant_method": "compressed-tensors", **PACK_QUANTIZED}]
)
def test_settings_that_are_missing_or_of_another(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    model = copy_of(checkpoint, tmp_path / "model")
    edit_config(model, quantization_config=settings)
    refused(model, f"has {Q_PROJ}.qweight where its config expects {Q_PROJ}.weight: what says how")


def test_biases_of_zeros_are_let_go(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path / "model")
    zeros = {"model.layers.0.mlp.up_proj.bias": torch.zeros(256, dtype=torch.float16)}
    edit_tensors(model, lambda tensors: tensors.update(zeros))
    assert quantize(model).fingerprint == quantize(checkpoint).fingerprint


def test_settings_in_a_file_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    model = copy_of(checkpoint, tmp_path / "model")
    edit_config(model, quantization_config=None)
    (model / "quantize_config.json").write_text(json.dumps(GPTQ))
    before = checkpoint_fingerprint(model)
    assert open_source(model).kind == "gptq"
    found = quantize(model)
    assert found.source_fingerprint == before
    assert "quantize_config.json" not in {path.name for path in found.path.iterdir()}
    (model / "quantize_config.json").write_text(json.dumps(GPTQ | {"checkpoint_format": "gptq_v2"}))
    assert checkpoint_fingerprint(model) != before
    (model / "quantize_config.json").write_text("{")
    refused(model.rename(tmp_path / "other"), "quantize_config.json: not valid JSON")
