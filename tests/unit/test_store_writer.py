"""Writing a store: any order, any thread, and either the whole of it or nothing."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import InternalError, StoreError
from common.store import Store, StoreWriter
from tests.stores import (
    CONFIG,
    DTYPES,
    LINEAR,
    RESIDENTS,
    add_everything,
    resident,
    weight,
    write_store,
)


def test_safetensors_itself_reads_the_files(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in write_store(tmp_path / "store").glob("*.safetensors"):
        tensors |= load_file(file)
    packed = {f"{name}.{part}" for name in LINEAR for part in ("codes", "scales")}
    assert tensors.keys() == packed | RESIDENTS.keys()
    assert tensors["lm_head.scales"].equal(weight("lm_head")[1])


def test_files_are_numbered_and_bounded(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", shard_bytes=800)
    files = sorted(file.name for file in path.glob("weights-*"))
    assert len(files) > 1
    count = f"{len(files):05d}"
    assert files == [f"weights-{n + 1:05d}-of-{count}.safetensors" for n in range(len(files))]


def test_threads_may_add_in_any_order_and_residents_in_pieces(tmp_path: Path) -> None:
    names = [*LINEAR, *RESIDENTS]
    random.Random(0).shuffle(names)
    with StoreWriter(tmp_path / "store", CONFIG, DTYPES) as writer:

        def add(name: str) -> None:
            if name in LINEAR:
                writer.add_weight(name, LINEAR[name], *weight(name))
            else:
                writer.add_resident_pieces(name, resident(name).view(-1).split(5))

        with ThreadPoolExecutor(4) as executor:
            list(executor.map(add, names))
        writer.commit()
    reference = Store.open(write_store(tmp_path / "reference", shard_bytes=800))
    store = Store.open(tmp_path / "store")
    # The content is the same, although the files and the order of writing are not.
    assert store.fingerprint == reference.fingerprint
    assert [entry.name for entry in store.weights] == list(LINEAR)


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", CONFIG, DTYPES) as writer:
        for name, shape in LINEAR.items():
            writer.add_weight(name, shape, *weight(name))
        for name in RESIDENTS:
            writer.add_resident(name, resident(name) * 2)
        writer.commit()
    reference = Store.open(write_store(tmp_path / "reference"))
    assert Store.open(tmp_path / "store").fingerprint != reference.fingerprint


def test_copies_go_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    path = write_store(tmp_path / "store", copies=[tmp_path / "tokenizer.json"])
    assert (path / "tokenizer.json").read_text() == "{}"


def test_a_copy_that_no_reader_would_take(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + 1)  # a hole
    with pytest.raises(StoreError, match="has 268435457 bytes, expected at most 268435456"):
        write_store(tmp_path / "store", copies=[tmp_path / "tokenizer.json"])
    assert not (tmp_path / "store").exists()


def partials(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if ".partial-" in entry.name]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        StoreWriter(tmp_path / "store", CONFIG, DTYPES) as writer,
    ):
        add_everything(writer)
        assert partials(tmp_path) == [f".store.partial-{os.getpid()}"]
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", CONFIG, DTYPES) as writer:
        add_everything(writer)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_store_cannot_be_committed(tmp_path: Path) -> None:
    with (
        pytest.raises(InternalError, match="39 tensors were not added"),
        StoreWriter(tmp_path / "store", CONFIG, DTYPES) as writer,
    ):
        writer.add_resident("model.norm.weight", resident("model.norm.weight"))
        writer.add_weight("lm_head", LINEAR["lm_head"], *weight("lm_head"))
        writer.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "add",
    [
        lambda w: w.add_weight("lm_head", (1, 2), *weight("lm_head")),
        lambda w: w.add_weight("nonsense", (33, 12), *weight("lm_head")),
        lambda w: w.add_weight("lm_head", (33, 12), weight("lm_head")[0], torch.zeros(3)),
        lambda w: w.add_weight("lm_head", (33, 12), weight("lm_head")[0][1:], torch.zeros(4)),
        lambda w: w.add_resident("nonsense", torch.zeros(12)),
        lambda w: w.add_resident("model.norm.weight", torch.zeros(12, dtype=torch.float16)),
        lambda w: w.add_resident("model.norm.weight", torch.zeros(13)),
        lambda w: w.add_resident("model.norm.weight", torch.zeros(11)),
        lambda w: [w.add_resident("model.norm.weight", torch.zeros(12)) for _ in range(2)],
    ],
)
def test_what_the_config_does_not_expect_is_a_defect(
    tmp_path: Path, add: Callable[[StoreWriter], object]
) -> None:
    with (
        pytest.raises(InternalError),
        StoreWriter(tmp_path / "store", CONFIG, DTYPES) as writer,
    ):
        add(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("gone")])
def test_an_existing_target_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "store")
    with (
        pytest.raises(StoreError, match="exists; remove it first"),
        StoreWriter(tmp_path / "store", CONFIG, DTYPES),
    ):
        pass
    assert partials(tmp_path) == []


def test_a_target_that_appears_meanwhile_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", CONFIG, DTYPES) as writer:
        add_everything(writer)
        (tmp_path / "store").mkdir()
        with pytest.raises(StoreError, match="exists"):
            writer.commit()
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_no_room_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_store(tmp_path / "first")
    needed = sum(file.stat().st_size for file in path.iterdir())

    def usage_with(free: int) -> Callable[[Path], Any]:
        return lambda _: type("Usage", (), {"free": free})

    monkeypatch.setattr(shutil, "disk_usage", usage_with(needed - 1))
    expected = f"needs {needed} bytes .* has {needed - 1} .* free"
    with (
        pytest.raises(StoreError, match=expected),
        StoreWriter(tmp_path / "second", CONFIG, DTYPES),
    ):
        pass
    assert os.listdir(tmp_path) == ["first"]
    monkeypatch.setattr(shutil, "disk_usage", usage_with(needed))
    write_store(tmp_path / "second")


def test_partials_of_the_dead_are_removed_those_of_the_living_kept(tmp_path: Path) -> None:
    dead = tmp_path / ".store.partial-1"  # of a living process, which does not hold it, however
    dead.mkdir()
    (dead / "weights-00001-of-00001.safetensors").touch()
    other = tmp_path / ".other.partial-1"
    other.mkdir()
    with StoreWriter(tmp_path / "store", CONFIG, DTYPES):
        assert not dead.exists()
        assert other.exists()
        with (
            pytest.raises(StoreError, match="another process writes"),
            StoreWriter(tmp_path / "store", CONFIG, DTYPES),
        ):
            pass
        assert len(partials(tmp_path)) == 2
