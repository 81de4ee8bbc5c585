"""Damages a store and a checkpoint in thousands of ways: ``python -m tests.fuzz DIRECTORY CASES SEED``.

Each case is a tiny store or checkpoint with one file changed. It must be refused in one line, or load to
exactly the same bytes; of a checkpoint, which has no checksums, to tensors of exactly the sizes that its
config names. A process of its own, with bounded memory, so that a crash, a hang or an absurd allocation
is seen as what it is. Prints, as JSON, how the cases ended; the same seed gives the same cases.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import Checkpoint
from common.errors import StoreError, WeightFeederError
from common.families import expected_tensors
from common.safetensors_file import TensorSpec, layout
from common.store import Store, StoreWriter

MEMORY_BYTES = 512 << 20  # beyond what it has after its imports
CONFIG: dict[str, Any] = {
    "model_type": "mistral", "hidden_size": 8, "intermediate_size": 18, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "rms_norm_eps": 1e-06,
    "sliding_window": 4096, "max_position_embeddings": 512, "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}  # fmt: skip
LINEAR, RESIDENTS = expected_tensors(CONFIG)
HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 2**31, 2**63, 2**64, 10**12, 10**18, 10**40, 10**5000),
    *(1e308, float("nan"), float("inf"), "", "0", "../../etc/passwd", "/dev/zero", "a" * 5000),
    *("\0", "\n", "\ud800", "qwen2", "F64", [], {}, [[]], [0] * 2000, {"": None}, [2**62] * 400),
    json.loads("[" * 200 + "]" * 200),
]
TOKENS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff", b"NaN", b"1e999", b"-",
          b'"a":1,', b"0" * 5000, b"[" * 3000, b"\\ud800")  # fmt: skip
LENGTHS = (0, 1, 2, 7, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def make_store(path: Path) -> Path:
    """Of one layer, in several files, with a tokenizer's file beside them."""
    tokenizer = path.parent / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0", "model": {"vocab": {"a": 0}}}')
    generator = torch.Generator().manual_seed(1)
    dtypes = {name: "F32" if "norm" in name else "BF16" for name in RESIDENTS}
    with StoreWriter(path, CONFIG, dtypes, copies=[tokenizer], shard_bytes=150) as writer:
        for name, (rows, columns) in LINEAR.items():
            codes = torch.randint(256, (rows * columns // 2,), generator=generator)
            scales = torch.rand(-(-rows * columns // 128), generator=generator)
            writer.add_weight(
                name, (rows, columns), codes.to(torch.uint8), scales.to(torch.bfloat16)
            )
        for name, shape in RESIDENTS.items():
            dtype = torch.float32 if "norm" in name else torch.bfloat16
            writer.add_resident(name, torch.randn(shape, generator=generator).to(dtype))
        writer.commit()
    return path


def unseal(path: Path) -> Path:
    """The store as they were before the index had checksums of other files, and of itself."""
    index = json.loads((path / "store.json").read_text())
    del index["files"], index["checksum"]
    (path / "store.json").write_text(json.dumps(index))
    return path


def make_checkpoint(path: Path) -> Path:
    """The same model in two files and an index."""
    path.mkdir()
    shapes = {f"{name}.weight": shape for name, shape in LINEAR.items()} | RESIDENTS
    weight_map = {}
    for number, names in enumerate((list(shapes)[::2], list(shapes)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        start, header = layout([TensorSpec(name, "BF16", shapes[name]) for name in names])
        (path / file).write_bytes(start + bytes(header.file_bytes - len(start)))
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def load_store(path: Path) -> Any:
    """Everything that a feeder and an engine take from a store, checked as they check it."""
    store = Store.open(path)
    content: dict[str, Any] = {"config": store.config, "fingerprint": store.fingerprint}
    for entry in store.weights:
        codes, scales = (
            torch.empty(size, dtype=torch.uint8) for size in (entry.codes_bytes, entry.scales_bytes)
        )
        store.read_weight_into(entry, codes, scales)
        store.check(entry, codes, scales)
        content[entry.name] = entry.shape, codes.numpy().tobytes(), scales.numpy().tobytes()
    for kept in store.residents:
        tensor = store.read_resident(kept)
        store.check_resident(kept, tensor)
        content[kept.name] = tensor.dtype, tensor.view(torch.uint8).numpy().tobytes()
    store.close()
    return content


def load_checkpoint(path: Path) -> Any:
    """The sizes of all tensors, each read to its end."""
    checkpoint = Checkpoint.open(path)
    linear, residents = expected_tensors(checkpoint.config)
    shapes = {f"{name}.weight": shape for name, shape in linear.items()} | residents
    for name, shape in shapes.items():
        elements = sum(piece.numel() for piece in checkpoint.pieces(name))
        if elements != torch.Size(shape).numel():
            raise AssertionError(f"{name} has {elements} elements, its config says {shape}")
    return None


def damaged(chance: random.Random, name: str, data: bytes) -> bytes:
    """The file's bytes, changed in one way or another."""
    while True:
        if name.endswith(".json") and chance.random() < 0.5:
            found = _damaged_json(chance, data)
        elif name.endswith(".safetensors") and chance.random() < 0.6:
            found = _damaged_header(chance, data)
        else:
            found = _damaged_bytes(chance, data)
        if found != data:
            return found


def _damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    start = chance.randrange(len(data))
    end = min(len(data), start + chance.choice((0, 1, 1, 2, 8, 100)))
    other = chance.randrange(len(data))
    return chance.choice((
        lambda: data[:start],
        lambda: data[:start] + chance.randbytes(end - start) + data[end:],
        lambda: data[:start] + data[end:],
        lambda: data[:start] + data[other : other + 40] + data[start:],
        lambda: data[:start] + chance.choice(TOKENS) + data[end:],
        lambda: data + chance.randbytes(chance.randint(1, 9)),
    ))()  # fmt: skip


def _damaged_json(chance: random.Random, data: bytes) -> bytes:
    """One value, anywhere in the tree, replaced, removed, moved or there twice."""
    tree = json.loads(data)
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = chance.choice(keys)
        if not isinstance(node[key], dict | list) or not node[key] or chance.random() < 0.2:
            break
        node = node[key]
    change = chance.randrange(5)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node[chance.choice((str(key) + "x", "__metadata__", ""))] = node.pop(key)
    elif change == 2:
        node[key] = node[chance.choice(keys)]
    elif change == 3 and isinstance(node, dict):
        twice = json.dumps(key) + ":" + json.dumps(chance.choice(HOSTILE[:-1]))
        text = json.dumps(tree)
        return text.replace(json.dumps(key) + ":", twice + "," + json.dumps(key) + ":", 1).encode()
    else:
        node[key] = chance.choice(HOSTILE)
    return json.dumps(tree).encode()


def _damaged_header(chance: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    if chance.random() < 0.2:
        near = length + chance.randint(-9, 9)
        return struct.pack("<Q", chance.choice((*LENGTHS, near, near))) + data[8:]
    header = _damaged_json(chance, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def flipped(case: int, chance: random.Random, files: dict[str, bytes]) -> tuple[str, bytes]:
    """One bit of one byte; case by case through all bytes of all files, and round again."""
    everywhere = [(name, at) for name, data in files.items() for at in range(len(data))]
    name, at = everywhere[case % len(everywhere)]
    changed = bytearray(files[name])
    changed[at] ^= 1 << chance.randrange(8)
    return name, bytes(changed)


def run(
    path: Path, cases: int, seed: int, flips: bool, load: Callable[[Path], Any]
) -> Counter[str]:
    """How many were refused, and how many loaded to the same. A flipped bit must be refused by name."""
    files = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    expected, ended = load(path), Counter[str]()
    step = next(
        n for n in (37, 41, 43) if sum(map(len, files.values())) % n
    )  # any prefix is spread
    for case in range(cases):
        chance = random.Random(f"{seed} {flips} {case}")
        if flips:
            name, data = flipped(case * step, chance, files)
        else:
            name = chance.choice(list(files))
            data = damaged(chance, name, files[name])
        (path / name).write_bytes(data)
        what = f"case {case} of {path.name}, {name}"
        try:
            found = load(path)
            if flips or found != expected:
                raise AssertionError(f"{what}: loaded, and is not what was written")
            ended["the same"] += 1
        except WeightFeederError as error:
            text = str(error)
            text.encode()
            if text.splitlines() != [text] or len(text) > 600:
                raise AssertionError(f"{what}: {text[:900]!r}") from error
            if flips and not (isinstance(error, StoreError) and str(path / name) in text):
                raise AssertionError(f"{what}: does not name it: {text[:900]!r}") from error
            ended["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r:.900}") from error
        finally:
            (path / name).write_bytes(files[name])
    return ended


def main(directory: Path, cases: int, seed: int) -> None:
    torch.set_num_threads(1)
    sys.set_int_max_str_digits(0)  # to write numbers that a reader must refuse
    store, checkpoint = make_store(directory / "store"), make_checkpoint(directory / "checkpoint")
    load_store(store)  # everything that is imported late
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    share = cases // 10
    ended = {
        "flips": run(store, 4 * share, seed, True, load_store),
        "store": run(store, share, seed, False, load_store),
        "old store": run(unseal(store), 3 * share, seed, False, load_store),
        "checkpoint": run(checkpoint, 2 * share, seed, False, load_checkpoint),
    }
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
