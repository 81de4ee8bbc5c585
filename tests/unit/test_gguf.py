"""GGUF files become stores: values, names, config and tokenizer, against the gguf package."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common import int4
from common.checkpoint_fingerprint import checkpoint_fingerprint
from common.errors import CheckpointError, ConfigError, UsageError
from common.log import log
from common.store import Store
from feeder.checkpoints.gguf_config import build_config
from feeder.checkpoints.gguf_file import GgufFile
from feeder.checkpoints.gguf_names import unpaired
from feeder.checkpoints.recognize import model_config, open_source
from feeder.doctor.__main__ import model_bytes
from feeder.quantize import quantize_checkpoint
from feeder.texts import MEASUREMENT
from tests.checkpoints import make_checkpoint
from tests.gguf_files import Quantize, all_as, write_gguf
from tests.processes import DEMO

SIZES: dict[str, Any] = {
    "hidden": 128,
    "intermediate": 256,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 96,
}


@pytest.fixture(autouse=True)
def _log_is_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", log.name)


def mixed(name: str, values: np.ndarray) -> tuple[np.ndarray, Type]:
    """As published files are: several types, some of which only the package can read."""
    kind = Type.Q4_0
    for part, other in {"embed": Type.Q8_0, "head": Type.Q4_1, "v_proj": Type.Q5_0}.items():
        kind = other if part in name else kind
    return all_as(kind)(name, values)


def k_quants(name: str, values: np.ndarray) -> tuple[np.ndarray, Type]:
    """The types of Q4_K_M, which most files have. Random blocks: the package has no quantizer for these."""
    if values.ndim == 1:
        return values, Type.F32
    fine = any(part in name for part in ("embed", "head", "v_proj", "down_proj"))
    kind, scales_at = (Type.Q6_K, (208,)) if fine else (Type.Q4_K, (0, 2))
    elements, block_bytes = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    blocks = generator.integers(0, 256, (values.size // elements, block_bytes), dtype=np.uint8)
    for at in scales_at:
        scales = generator.uniform(1e-4, 1e-3, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    return blocks.reshape(len(values), -1), kind


FILES: dict[str, Quantize] = {
    "Q4_0": all_as(Type.Q4_0),
    "Q8_0": all_as(Type.Q8_0),
    "F16": all_as(Type.F16),
    "BF16": all_as(Type.BF16),
    "F32": all_as(Type.F32),
    "mixed": mixed,
    "Q4_K_M": k_quants,
}


def as_stored(store: Store, name: str) -> torch.Tensor:
    entry = next(entry for entry in store.weights if f"{entry.name}.weight" == name)
    codes, scales = store.read_weight(entry)
    store.check(entry, codes, scales)
    return int4.dequantize(codes, scales, entry.shape, torch.float32)


@pytest.mark.parametrize("name", FILES)
def test_the_store_is_made_of_what_the_package_dequantizes(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = SIZES | ({"hidden": 256} if name == "Q4_K_M" else {})  # whole blocks
    checkpoint = make_checkpoint(tmp_path / "model", **sizes)
    file = tmp_path / "model.gguf"
    values = write_gguf(file, checkpoint, FILES[name])
    store = quantize_checkpoint(file, tmp_path / "store", "cpu", progress=False, method="absmax")
    assert store.source_format == "gguf"
    assert store.source_fingerprint == checkpoint_fingerprint(file)
    for entry in store.weights:
        expected = values.pop(f"{entry.name}.weight")
        wanted = int4.dequantize(*int4.quantize(expected), entry.shape, torch.float32)
        assert as_stored(store, f"{entry.name}.weight").equal(wanted)
    for kept in store.residents:
        expected, found = values.pop(kept.name), store.read_resident(kept)
        vector = expected.ndim == 1
        kept_as = "F32" if vector else {"F16": "F16", "F32": "F32"}.get(name, "BF16")
        assert kept.dtype == kept_as
        assert found.equal(expected.to(found.dtype))
    assert not values
    assert model_bytes(str(file)) == store.packed_bytes
    assert store.dtype == "bfloat16"
    assert ("converted from gguf: " in caplog.text) == (name not in ("F16", "BF16", "F32"))


def test_blocks_of_32_with_one_scale_are_kept_bit_for_bit(tmp_path: Path) -> None:
    """Where the largest of each 32 is -8 times one scale, and that a bf16 number, all fits."""

    def quantize(name: str, values: np.ndarray) -> tuple[np.ndarray, Type]:
        if values.ndim == 2:
            steps = np.clip(np.round(values / np.abs(values).max() * 7), -7, 7)
            steps[:, ::32] = -8
            values = (steps * 2.0**-6).astype(np.float32)
        return all_as(Type.Q4_0)(name, values)

    checkpoint = make_checkpoint(tmp_path / "model", **SIZES, tied=True)
    values = write_gguf(tmp_path / "model.gguf", checkpoint, quantize)
    store = quantize_checkpoint(tmp_path / "model.gguf", tmp_path / "store", "cpu", progress=False)
    assert store.tied
    for entry in store.weights:
        name = f"{entry.name}.weight"
        assert as_stored(store, name).equal(values[name])


def test_config_is_that_of_transformers(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", **SIZES)
    file = tmp_path / "model.gguf"
    keys = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    keys["qwen2.rope.scaling.original_context_length"] = 128
    write_gguf(file, checkpoint, all_as(Type.F16), keys=keys)
    ours = model_config(file)
    assert ours["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    original = json.loads((checkpoint / "config.json").read_text())
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf").to_dict()
    sizes = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    sizes += ["num_key_value_heads", "max_position_embeddings", "model_type"]
    for key in [*sizes, "tie_word_embeddings"]:
        assert ours[key] == original[key] == theirs[key], key
    assert ours["vocab_size"] == original["vocab_size"]  # transformers takes it from a tokenizer
    assert ours["rms_norm_eps"] == original["rms_norm_eps"]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    sizes = SIZES | {"vocab": 320, "layers": 1}
    checkpoint = make_checkpoint(tmp_path / "model", **sizes)
    (tmp_path / "files").mkdir()
    write_gguf(tmp_path / "files" / "x.gguf", checkpoint, all_as(Type.F16), tokenizer=DEMO)
    # What lies beside the file is not asked, and a directory with one file is as good as the file.
    (tmp_path / "files" / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": "x.Y"}}'
    )
    store = quantize_checkpoint(tmp_path / "files", tmp_path / "store", "cpu", progress=False)
    found = AutoTokenizer.from_pretrained(store.path, local_files_only=True)
    original = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    for text in ("1.1+2.3=?", "001.10 + 2\n\\boxed{3.4}", "naïve  ünïcode 12345 don't"):
        assert found(text).input_ids == original(text).input_ids
        assert found.decode(found(text).input_ids) == text
    turn = [{"role": "user", "content": "1+1=?"}]
    assert found.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True
    ) == original.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert found.eos_token_id == original.eos_token_id
    generation = json.loads((store.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [319]


def test_without_a_tokenizer_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", **(SIZES | {"layers": 1}))
    write_gguf(tmp_path / "x.gguf", checkpoint, all_as(Type.F16))
    store = quantize_checkpoint(tmp_path / "x.gguf", tmp_path / "store", "cpu", progress=False)
    assert "x.gguf: it has no tokenizer: prompts have to be token ids; or put" in caplog.text
    assert not (store.path / "tokenizer.json").exists()
    with pytest.raises(
        UsageError, match="put its tokenizer.json beside it, and name the directory"
    ):
        quantize_checkpoint(
            tmp_path / "x.gguf", tmp_path / "measured", "cpu", measurement=MEASUREMENT
        )

    caplog.clear()
    (tmp_path / "x.gguf").rename(checkpoint / "x.gguf")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    store = quantize_checkpoint(checkpoint, tmp_path / "other", "cpu", progress=False)
    assert "x.gguf: it has no tokenizer: the one beside it is taken" in caplog.text
    assert (store.path / "tokenizer.json").is_file()


# The architecture llama: rows of q and k are reordered


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_rows_are_put_back(heads: int, half: int, columns: int) -> None:
    """By the formula of llama.cpp's converter: [heads, 2, half] becomes [heads, half, 2]."""
    original = torch.arange(heads * 2 * half * columns).view(heads * 2 * half, columns)
    theirs = original.numpy().reshape(heads, 2, half, columns).swapaxes(1, 2)
    stored = torch.from_numpy(np.ascontiguousarray(theirs)).view(-1, columns)
    assert unpaired(stored, heads).equal(original)


def llama_keys(**more: Any) -> Callable[[str], Any]:
    keys = {
        "general.architecture": "llama",
        "llama.context_length": 1024,
        "llama.embedding_length": 64,
        "llama.block_count": 1,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 500000.0,
    }
    return (keys | more).get


EMBEDDING = {"model.embed_tokens.weight": (96, 64)}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_rope_is_recognized_by_its_factors(factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    factors = [float(np.float32(f)) for f in plain / scaled.double()]
    keys = llama_keys(**{"llama.embedding_length": 512})
    assert build_config(keys, EMBEDDING, factors)["rope_parameters"] == scaling
    with pytest.raises(ConfigError, match="factors that are not Llama 3's"):
        build_config(keys, EMBEDDING, [2.0, *factors[1:]])


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 2.0}, 2.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scale_linear": 8.0}, 8.0),
        ({"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 4.0}, 2.0),
        ({"llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.factor": 1.0}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
    ],
)
def test_a_factor_without_a_kind_is_linear(keys: dict[str, Any], factor: float | None) -> None:
    expected: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
    if factor is not None:
        expected |= {"rope_type": "linear", "factor": factor}
    assert build_config(llama_keys(**keys), EMBEDDING, None)["rope_parameters"] == expected


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"general.architecture": "gpt2"}, "general.architecture is 'gpt2', expected one of qwen2"),
        ({"general.architecture": None}, "general.architecture is None, expected one of"),
        (
            {"llama.block_count": None},
            "llama.block_count is None, expected a positive whole number",
        ),
        ({"llama.attention.head_count": [1, 2]}, r"head_count is \[1, 2\], expected a positive"),
        (
            {"llama.rope.dimension_count": 8},
            "dimension_count is 8, expected all 16 columns of a head",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, expected none"),
        ({"llama.rope.scaling.type": "longrope"}, "scaling.type is 'longrope', expected none, lin"),
        ({"llama.rope.scaling.type": "linear"}, "scaling.factor is None, expected a number above"),
        ({"llama.rope.scale_linear": "x"}, "rope.scale_linear is 'x', expected a number above 0"),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.attn_factor": 0.5,
            },
            "attn_factor is 0.5, expected 1",
        ),
        ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0, expected a number above 0"),
    ],
)
def test_keys_that_are_not_understood(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        build_config(llama_keys(**keys), EMBEDDING, None)
    assert "\n" not in str(caught.value)


# Files that cannot be believed


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf")
    checkpoint = make_checkpoint(path / "model", **(SIZES | {"layers": 1, "vocab": 320}))
    write_gguf(path / "x.gguf", checkpoint, all_as(Type.Q8_0), tokenizer=DEMO)
    return (path / "x.gguf").read_bytes()


def text(data: str) -> bytes:
    return struct.pack("<Q", len(data)) + data.encode()


def head(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


HOSTILE = {
    "empty": (b"", "it ends within its header"),
    "another kind": (
        b"PK\x03\x04" + bytes(60),
        r"it begins with b'PK\\x03\\x04', expected b'GGUF'",
    ),
    "big endian": (b"GGUF\x00\x00\x00\x03" + bytes(60), "its version is 50331648, expected 2 or 3"),
    "many keys": (head(0, 1 << 60), "it says 1152921504606846976 keys, expected at most"),
    "many tensors": (head(1 << 60, 0), "it says 1152921504606846976 tensors, expected at most"),
    "long text": (head(0, 1) + struct.pack("<Q", 1 << 62) + bytes(99), "bytes of a text, expected"),
    "long array": (
        head(0, 1) + text("a") + struct.pack("<IIQ", 9, 0, 1 << 60) + bytes(99),
        "items in arrays, expected at most",
    ),
    "array in array": (
        head(0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(99),
        "a value has the type 9, which is not known here",
    ),
    "array past the end": (
        head(0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 1 << 20) + bytes(99),
        "it ends within its header",
    ),
    "type of a value": (
        head(0, 1) + text("a") + struct.pack("<I", 77),
        "the type 77, which is not",
    ),
    "huge tensor": (
        head(1, 0) + text("a") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0) + bytes(99),
        "elements of a tensor, expected at most",
    ),
    "dimensions": (head(1, 0) + text("a") + struct.pack("<I", 1 << 31), "dimensions of a tensor"),
    "type of a tensor": (
        head(1, 0) + text("a") + struct.pack("<IQIQ", 1, 32, 99, 0) + bytes(99),
        "is no GGUF file that can be read: .*99.* is not a valid GGMLQuantizationType",
    ),
    "same key twice": (
        head(0, 2) + 2 * (text("a") + struct.pack("<IB", 0, 1)) + bytes(99),
        "is no GGUF file that can be read: .*Duplicate a already",
    ),
    "a key of two lines, twice": (
        head(0, 2) + 2 * (text("a\nb\x1b") + struct.pack("<IB", 0, 1)) + bytes(99),
        "is no GGUF file that can be read: .*Duplicate a",
    ),
    "tensor past the end": (
        head(1, 0) + text("a") + struct.pack("<IQIQ", 1, 1 << 20, 0, 0) + bytes(99),
        "it is truncated: its tensors take 4194304 bytes, 92 are there; fetch it again",
    ),
    "tensor beyond the end": (
        head(1, 0) + text("a") + struct.pack("<IQIQ", 1, 1, 0, (1 << 64) - 32) + bytes(99),
        "it is truncated",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_one_line(tmp_path: Path, name: str) -> None:
    data, match = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_source(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("lacking", [1, 32, 4096])
def test_a_truncated_file(small: bytes, tmp_path: Path, lacking: int) -> None:
    (tmp_path / "x.gguf").write_bytes(small[:-lacking])
    with pytest.raises(
        CheckpointError, match="it is truncated: its tensors take .* are there; fetch it again"
    ):
        open_source(tmp_path / "x.gguf")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers_are_refused_or_harmless(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the header changed at random: an error of ours, or a file that reads as something."""
    damaged = bytearray(small[:16000])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 12000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(damaged) + small[16000:])
    try:
        open_source(path)
    except (CheckpointError, ConfigError) as error:
        assert "\n" not in str(error)


def test_several_files_in_a_directory(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 2 GGUF files, expected one; name the one"):
        open_source(tmp_path)


def test_a_link_out_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "private.gguf").write_bytes(b"")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "x.gguf").symlink_to(tmp_path / "private.gguf")
    with pytest.raises(CheckpointError, match="is a link to .*, outside the checkpoint"):
        open_source(tmp_path / "files")


def test_types_that_nothing_can_dequantize(tmp_path: Path) -> None:
    entry = struct.pack("<IQIQ", 1, 32, Type.Q8_1, 0)
    data = head(1, 0) + text("token_embd.weight") + entry
    (tmp_path / "x.gguf").write_bytes(data + bytes(200))
    with pytest.raises(
        CheckpointError,
        match="'token_embd.weight' is stored as Q8_1, which the package gguf cannot",
    ):
        GgufFile([tmp_path / "x.gguf"])


# Files in parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    checkpoint = make_checkpoint(tmp_path / "model", **(SIZES | {"layers": 1}))
    (tmp_path / "parts").mkdir()
    write_gguf(tmp_path / "parts" / "x.gguf", checkpoint, all_as(Type.Q8_0), part_tensors=6)
    write_gguf(tmp_path / "whole.gguf", checkpoint, all_as(Type.Q8_0))
    return sorted((tmp_path / "parts").iterdir())


def test_parts_are_one_model(tmp_path: Path, parts: list[Path]) -> None:
    assert [part.name for part in parts] == [f"x-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    stores = [
        quantize_checkpoint(path, tmp_path / f"store-{number}", "cpu", progress=False)
        for number, path in enumerate([tmp_path / "whole.gguf", parts[1], tmp_path / "parts"])
    ]
    assert len({store.fingerprint for store in stores}) == 1
    assert stores[1].source_fingerprint == stores[2].source_fingerprint
    before = checkpoint_fingerprint(parts[0])
    parts[2].write_bytes(parts[2].read_bytes()[:-1] + b"x")
    assert checkpoint_fingerprint(parts[0]) != before


def test_parts_that_do_not_belong_together(parts: list[Path]) -> None:
    swapped = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(
        CheckpointError, match="is part 2 of 3 by its keys, counted from 0, expected 1"
    ):
        open_source(parts[0])
    parts[1].write_bytes(swapped)
    alone = parts[0].rename(parts[0].with_name("alone.gguf"))
    with pytest.raises(CheckpointError, match="is part 0 of 3 by its keys"):
        open_source(alone)
    with pytest.raises(CheckpointError, match="x-00001-of-00003.gguf is missing, expected all 3"):
        open_source(parts[2])
    with pytest.raises(CheckpointError, match="has 3 GGUF files, expected one"):
        open_source(alone.parent)
