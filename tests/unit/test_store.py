"""Stores: read back exactly, and refused with one line when anything is off."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import StoreCorruptError, StoreError
from common.store import FORMAT_VERSION, Store, checksum
from tests.stores import CONFIG, LINEAR, RESIDENTS, resident, weight, write_store


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    copies = []
    for name, text in (("tokenizer.json", '{"a": 1}'), ("chat_template.jinja", "{{ messages }}")):
        (path.parent / name).write_text(text)
        copies.append(path.parent / name)
    return write_store(path, shard_bytes=800, source_fingerprint="0" * 32, copies=copies)


@pytest.fixture(scope="module")
def unsealed(pristine: Path) -> Path:
    """Without a checksum of the index, so that its fields are what is refused."""
    path = shutil.copytree(pristine, pristine.parent / "unsealed")
    edit_json(path / "store.json", lambda data: [data.pop(key) for key in ("files", "checksum")])
    return path


@pytest.fixture
def sealed(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "sealed")


@pytest.fixture
def copy(unsealed: Path, tmp_path: Path) -> Path:
    """A copy without a checksum of the index, as they were before, so that its fields can be changed."""
    return shutil.copytree(unsealed, tmp_path / "store")


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def test_reads_back_what_was_written(pristine: Path) -> None:
    store = Store.open(pristine)
    assert [entry.name for entry in store.weights] == list(LINEAR)
    assert {entry.name for entry in store.residents} == set(RESIDENTS)
    for entry in store.weights:
        codes, scales = store.read_weight(entry)
        expected_codes, expected_scales = weight(entry.name)
        assert codes.equal(expected_codes)
        assert scales.equal(expected_scales)
        assert entry.packed_bytes == codes.nbytes + scales.nbytes
        assert entry.elements == LINEAR[entry.name][0] * LINEAR[entry.name][1]
        store.check(entry, codes, scales)
    for kept in store.residents:
        tensor = store.read_resident(kept)
        assert tensor.equal(resident(kept.name))
        assert tensor.dtype == resident(kept.name).dtype
        store.check_resident(kept, tensor)
    assert store.packed_bytes == sum(entry.packed_bytes for entry in store.weights)
    assert store.resident_bytes == sum(resident(name).nbytes for name in RESIDENTS)
    assert (store.dtype, store.tied, store.config) == ("bfloat16", False, CONFIG)
    assert (store.format_version, store.source_fingerprint) == (FORMAT_VERSION, "0" * 32)


def test_reading_copies_nothing(pristine: Path) -> None:
    store = Store.open(pristine)
    first, again = (store.read_weight(store.weights[0])[0] for _ in range(2))
    assert first.data_ptr() == again.data_ptr()
    store.close()
    assert first.equal(weight(store.weights[0].name)[0])  # a view outlives `close`


def test_checksum_is_of_the_bytes() -> None:
    tensor = torch.randn(7, 3).to(torch.bfloat16)
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert checksum(tensor) == checksum(data) == checksum(memoryview(bytearray(data)))
    assert checksum(tensor.T) == checksum(tensor.T.contiguous())
    assert checksum(b"") == "99aa06d3014798d86001c324468d497f"  # of XXH3_128bits


def test_opening_needs_no_torch(pristine: Path) -> None:
    """A launcher looks at stores and checkpoints, and must not wait for torch nor wake a GPU."""
    code = (
        "import sys, feeder.quantize; from common.store import Store; "
        "print(Store.open(sys.argv[1]).fingerprint); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(pristine)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == Store.open(pristine).fingerprint


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_check_finds_a_flipped_bit_and_names_weight_and_file(copy: Path, part: str) -> None:
    store = Store.open(copy)
    entry = store.weights[3]
    codes, scales = (tensor.clone() for tensor in store.read_weight(entry))
    {"codes": codes, "scales": scales}[part].view(torch.uint8)[-1] ^= 1
    with pytest.raises(StoreCorruptError, match=re.escape(f"{entry.name}.{part}")) as caught:
        store.check(entry, codes, scales)
    assert str(copy / entry.file) in str(caught.value)


def test_check_resident_finds_a_flipped_bit(copy: Path) -> None:
    store = Store.open(copy)
    entry = store.residents[0]
    tensor = store.read_resident(entry).clone()
    tensor.view(torch.uint8)[0] ^= 128
    with pytest.raises(StoreCorruptError, match=re.escape(entry.name)):
        store.check_resident(entry, tensor)


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_key("format_version", 2), "format_version is 2, this program reads version 1; "),
        (set_key("format_version", True), "format_version is True"),
        (set_key("format", "gguf"), "format is 'gguf', expected 'weight-feeder'"),
        (set_key("block", 64), "block is 64, expected 128"),
        (set_key("tied", True), "tied is True, expected False"),
        (set_key("dtype", "float32"), "dtype is 'float32', expected 'bfloat16'"),
        (set_key("fingerprint", "0" * 32), "fingerprint is '0000"),
        (set_key("source_fingerprint", "x"), "source_fingerprint is neither null nor 32 hex"),
        (set_key("weights", []), "weights has 0 entries, expected 15 for this config"),
        (set_key("weights", 3), "weights has 3"),
        (lambda d: d["weights"].reverse(), "an entry is named 'lm_head', expected 'model.layers.0"),
        (lambda d: d["weights"][0].update(shape=[12, 13]), "q_proj: shape is [12, 13]"),
        (lambda d: d["weights"][0].update(codes_bytes=1), "q_proj: codes_bytes is 1, expected 72"),
        (lambda d: d["weights"][0].update(dtype="NF4"), "q_proj: dtype is 'NF4', expected 'INT4'"),
        (lambda d: d["weights"][0].update(file="../x"), "q_proj: file is '../x', expected a name"),
        (lambda d: d["weights"][0].update(codes_checksum="0"), "codes_checksum is '0', expected"),
        (lambda d: d["residents"][0].update(dtype="I8"), "weight: dtype is 'I8', expected one of"),
        (lambda d: d["residents"][0].update(bytes=-1), "weight: bytes is -1, expected 792"),
    ],
)
def test_each_field_of_the_index_is_checked(
    copy: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_json(copy / "store.json", edit)
    with pytest.raises(StoreError, match=re.escape(message)) as caught:
        Store.open(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is not a directory"),
        (lambda path: (path / "store.json").unlink(), "has no store.json, so it is not a store"),
        (lambda path: (path / "store.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "store.json").write_text("[]"), "a JSON list, expected an object"),
        (lambda path: (path / "store.json").write_text("[" * 10**6), "nested too deeply"),
        (lambda path: (path / "store.json").write_bytes(b'{"\xff": 1}'), "not UTF-8"),
        (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
        (lambda path: edit_json(path / "config.json", set_key("model_type", "gemma2")), "'gemma2'"),
        (lambda path: edit_json(path / "config.json", set_key("vocab_size", 34)), "shape is [33"),
        (lambda path: next(path.glob("weights-00002*")).unlink(), "is missing"),
        (lambda path: os.truncate(next(path.glob("weights-00002*")), 100), "is truncated"),
        (lambda path: os.truncate(next(path.glob("residents-*1-of*")), 9**4), "left over"),
        (lambda path: next(path.glob("residents-*1-of*")).write_bytes(b"GGUF" * 9), "no safetens"),
    ],
)
def test_missing_and_broken_files_are_refused(
    copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(copy)
    with pytest.raises(StoreError, match=re.escape(message)) as caught:
        Store.open(copy)
    assert "\n" not in str(caught.value)


def test_a_store_without_the_list_of_files_is_opened(copy: Path, sealed: Path) -> None:
    assert Store.open(copy).fingerprint == Store.open(sealed).fingerprint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing, expected the file that store.json names"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "the checksum is of"),
        (lambda path: path.write_bytes(path.read_bytes().swapcase()), "the store is damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "is missing, expected the file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is missing, expected the file"),
    ],
)
def test_files_without_tensors_are_checked_too(
    sealed: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(sealed / name)
    with pytest.raises(StoreError, match=re.escape(message)) as caught:
        Store.open(sealed)
    assert str(caught.value).startswith(str(sealed / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_key("method", "absmin"), "store.json: its own checksum is"),
        (set_key("a key of a later release", 1), "store.json: its own checksum is"),
        (lambda d: d.pop("files"), "store.json: its own checksum is"),
        (lambda d: d.pop("checksum"), "expected None; the store is damaged"),
        (lambda d: d["files"][0].update(name="../x"), "its own checksum is"),
    ],
)
def test_the_index_tells_of_its_own_damage(
    sealed: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_json(sealed / "store.json", edit)
    with pytest.raises(StoreCorruptError, match=re.escape(message)):
        Store.open(sealed)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (3, "files is 3, expected a list of objects"),
        ([3], "files is [3], expected a list of objects"),
        ([], "files names 0 files, expected each once, config.json too"),
        ([{"name": "../x", "bytes": 1, "checksum": "0" * 32}], "name is '../x', expected a name"),
        ([{"name": "x", "bytes": True, "checksum": "0" * 32}], "bytes of x is True, expected a"),
        (
            [{"name": "x", "bytes": 1 << 42, "checksum": "0" * 32}],
            "bytes of x is 4398046511104, expected a size of at most 268435456",
        ),
        ([{"name": "x", "bytes": 1, "checksum": "0"}], "checksum of x is '0', expected 32 hex"),
    ],
)
def test_a_list_of_files_that_makes_no_sense(sealed: Path, files: Any, message: str) -> None:
    """Whoever makes it on purpose can make its checksum too."""
    data = json.loads((sealed / "store.json").read_text()) | {"files": files}
    rest = {key: value for key, value in data.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    data["checksum"] = checksum(text.encode())
    (sealed / "store.json").write_text(json.dumps(data))
    with pytest.raises(StoreError, match=re.escape(message)):
        Store.open(sealed)


@pytest.mark.parametrize(
    "name", ["weights-00001-of-00002.safetensors", "config.json", "store.json"]
)
def test_links_that_lead_out_of_the_store_are_refused(
    sealed: Path, tmp_path: Path, name: str
) -> None:
    (sealed / name).rename(tmp_path / name)
    (sealed / name).symlink_to(tmp_path / name)
    with pytest.raises(StoreError, match="is a link to .*, outside the store"):
        Store.open(sealed)


def test_files_of_another_layout_are_refused(copy: Path, tmp_path: Path) -> None:
    """Two files change places: each is whole, but not what the index says."""
    one, two = sorted(copy.glob("weights-*"))[:2]
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    with pytest.raises(StoreError, match="is missing, expected U8"):
        Store.open(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=4,
)


def mutate(data: Any, choose: random.Random, value: Any) -> None:
    """Replace or remove one value, anywhere in a JSON tree."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = choose.choice(keys)
        child = data[key]
        if isinstance(child, dict | list) and child and choose.random() < 0.8:
            data = child
        elif choose.random() < 0.3:
            del data[key]
            return
        else:
            data[key] = value
            return


@given(st.randoms(use_true_random=False), json_values, st.sampled_from(["store", "config"]))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_json_is_opened_or_refused_never_more(
    unsealed: Path, choose: random.Random, value: Any, which: str
) -> None:
    file = unsealed / f"{which}.json"
    intact = file.read_bytes()
    data = json.loads(intact)
    mutate(data, choose, value)
    try:
        file.write_text(json.dumps(data))
        store = Store.open(unsealed)
    except StoreError as error:
        assert str(error).splitlines() == [str(error)]
    else:
        assert [entry.name for entry in store.weights] == list(LINEAR)
    finally:
        file.write_bytes(intact)


@given(st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_bytes_are_opened_or_refused_never_more(
    unsealed: Path, data: st.DataObject
) -> None:
    files = ["store.json", "config.json", "weights-00001-of-00002.safetensors"]
    file = unsealed / data.draw(st.sampled_from(files))
    intact = file.read_bytes()
    # Of a safetensors file only the header can matter to `open`.
    end = min(len(intact), 600)
    position = data.draw(st.integers(0, end - 1))
    length = data.draw(st.integers(0, 4))
    inserted = data.draw(st.binary(max_size=4))
    try:
        file.write_bytes(intact[:position] + inserted + intact[position + length :])
        Store.open(unsealed)
    except StoreError as error:
        assert str(error).splitlines() == [str(error)]
    finally:
        file.write_bytes(intact)


def test_reading_can_be_stopped(pristine: Path) -> None:
    store = Store.open(pristine)
    entry = store.weights[0]
    codes = torch.full((entry.codes_bytes,), 255, dtype=torch.uint8)
    scales = torch.full((entry.scales_bytes,), 255, dtype=torch.uint8)
    stop = threading.Event()
    store.read_weight_into(entry, codes, scales, stop)
    assert torch.equal(codes, store.read_weight(entry)[0])
    stop.set()
    codes.fill_(255)
    with pytest.raises(StoreError, match="reading was stopped"):
        store.read_weight_into(entry, codes, scales, stop)
    assert codes.eq(255).all()
    store.close()
