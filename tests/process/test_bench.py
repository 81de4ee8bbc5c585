"""``python -m bench`` with the demo model on the CPU: what it counts is right, and it can go on.

Times are only checked against each other: how fast this machine is says nothing.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from common.store import Store
from feeder.strategies.resident import stream_slots
from tests.processes import DEMO, Ended, Process, Room

COUNTS = ["1", "16", "-1"]
STRATEGIES = ["on-demand", "ring", "resident"]
CACHE_BYTES = 4 << 20


def bench(room: Room, store: Path, output: Path, *flags: object) -> Process:
    flags = ("--device=cpu", "--store", store, "--output", output, *flags)
    return room.start("-m", "bench", *flags)


def well(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    return ended


def measured(results: dict[str, Any], part: str) -> dict[tuple, dict[str, Any]]:
    """The measurements of a part by their settings."""
    keys = {
        "ceilings": (),
        "sweep": ("strategy", "cache"),
        "ttft": ("strategy", "cache", "prompt_tokens"),
        "baselines": ("baseline",),
    }[part]
    found = [m for m in results["measurements"] if m["part"] == part]
    by_setting = {tuple(m["setting"][key] for key in keys): m for m in found}
    assert len(by_setting) == len(found)
    return by_setting


def check_sweep(sweep: dict[tuple, dict[str, Any]], store: Store) -> None:
    total = len(store.weights)
    sizes = [("ring", "4MiB"), ("resident", "4MiB")]
    assert set(sweep) == {(s, c) for s in STRATEGIES for c in COUNTS} | set(sizes)
    for (strategy, cache), found in sweep.items():
        ms = found["ms_per_token"]
        assert 0 < ms["min"] <= ms["p10"] <= ms["median"] <= ms["p90"] <= ms["max"]
        assert len(ms["all"]) == found["tokens"] == 3
        assert found["tok_per_s"] == pytest.approx(1000 / ms["median"], rel=1e-3)
        assert 0 <= found["stall_share"] <= 1
        assert not found["stopped_early"] and not found["cut"]
        assert found["setting"]["slots"] == "dequantized"
        assert found["feeder_peak_bytes"] == found["slots_bytes"]  # on the CPU there is no more
        if cache == "4MiB":
            assert found["slots_bytes"] == CACHE_BYTES
        elif cache == "-1":
            assert found["slot_count"] == total
            assert found["hit_rate"] == 1.0
            assert found["streamed_bytes_per_token"] == 0
        else:
            count = int(cache)
            staying = count - stream_slots(count, total) if strategy == "resident" else 0
            if strategy == "on-demand" and count > 1:  # what was used last is a matter of timing
                assert 0 <= found["hit_rate"] <= count / total, found
            else:
                assert found["hit_rate"] == pytest.approx(staying / total, abs=1e-6), found
                streamed = found["streamed_bytes_per_token"]
                assert (streamed == store.packed_bytes) == (staying == 0), found
            assert found["slot_count"] == count
        assert (found["link_bytes_per_s"] > 0) == (cache != "-1")
    assert 0 < sweep["resident", "4MiB"]["hit_rate"] < 1
    assert sweep["ring", "4MiB"]["hit_rate"] == 0


def check_baselines(baselines: dict[tuple, dict[str, Any]], store: Store, text: str) -> None:
    copied = baselines["synchronous copy",]
    assert copied["bytes_per_token"] == store.packed_bytes  # LRU of all but one hits nothing
    assert copied["hit_rate"] == 0
    assert copied["host_memory"] == "pageable"
    assert copied["text_checksum"] == text
    offloaded = baselines["accelerate cpu_offload",]
    if importlib.util.find_spec("accelerate") is None:
        assert "accelerate is not installed" in offloaded["failed"]
        return
    with safe_open(DEMO / "model.safetensors", framework="pt") as file:
        elements = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    kept = {name: n for name, n in elements.items() if not name.startswith("model.layers.7.")}
    assert offloaded["bytes_per_token"] == 2 * sum(kept.values())
    scaled = offloaded["scaled"]
    assert scaled["label"] == "scaled from 7 layers"
    assert scaled["bytes_per_token"] == 2 * sum(elements.values())
    rate = offloaded["bytes_per_token"] / offloaded["ms_per_token"]["median"]
    assert scaled["bytes_per_token"] / scaled["ms_per_token"] == pytest.approx(rate, rel=1e-3)


def test_everything_and_again(room: Room, demo_store: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "results.json", tmp_path / "plot.svg"
    flags = ["all", "--quick", "--prompt-tokens=16,512", "--baseline-layers=7"]
    flags += ["--descends-cache=56", f"--plot={picture}"]
    ended = well(bench(room, demo_store, output, *flags).wait())
    assert ended.out == ""
    results, store = json.loads(output.read_text()), Store.open(demo_store)

    (run,) = results["runs"]
    assert run["command"].startswith("python -m bench --device=cpu --store ")
    assert run["device"] and run["commit"] and run["cpus"] >= run["usable_cpus"] >= 1
    assert (run["store"], run["packed_bytes"]) == (store.fingerprint, store.packed_bytes)
    assert "link_bytes_per_s" not in run  # there is none
    sweep = measured(results, "sweep")
    check_sweep(sweep, store)
    texts = {found["text_checksum"] for found in sweep.values()}
    assert len(texts) == 1  # results do not depend on cache and strategy
    check_baselines(measured(results, "baselines"), store, texts.pop())
    ceilings = measured(results, "ceilings")[()]
    assert ceilings["memory_bytes_per_s"] > 0 and not ceilings["link_by_piece_bytes_per_s"]
    ttft = measured(results, "ttft")
    assert set(ttft) == {
        (s, c, n) for s, c in (("ring", "16"), ("resident", "4MiB")) for n in (16, 512)
    }
    for (strategy, _, tokens), found in ttft.items():
        if tokens == 512:
            assert "more than the model's context of 512" in found["failed"]
            continue
        assert all(
            (n == store.packed_bytes) == (strategy == "ring") for n in found["streamed_bytes"]
        )
        assert len(found["streamed_bytes"]) == len(found["ms_to_first_token"]["all"]) == 3

    drawn = picture.read_bytes() if picture.exists() else None
    assert (drawn is None) == (importlib.util.find_spec("matplotlib") is None)
    assert drawn is None or all(name.encode() in drawn for name in [*STRATEGIES, "synchronous"])
    before = output.read_bytes()
    ended = well(bench(room, demo_store, output, *flags).wait())
    assert output.read_bytes() == before
    assert "feeder:" not in ended.err  # not even one was started
    assert (picture.read_bytes() if picture.exists() else None) == drawn


DIES = """
import os, signal
from feeder.strategies.ring import Ring

class Dies(Ring):
    name = "dies"

    def wanted(self, position):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_fails_is_recorded_and_the_sweep_goes_on(
    room: Room, demo_store: Path, tmp_path: Path
) -> None:
    output, strategy = tmp_path / "results.json", tmp_path / "dies.py"
    strategy.write_text(DIES)
    flags = ["sweep", f"--strategies={strategy}:Dies,ring", "--caches=5,1KiB"]
    flags += ["--slots=packed", "--context=200", "--tokens=50", "--time-limit=0.001"]
    well(bench(room, demo_store, output, *flags).wait())
    results = json.loads(output.read_text())
    measurements = results["measurements"]
    of_five = [m for m in measurements if m["setting"]["cache"] == "5"]
    found = {m["setting"]["strategy"].rpartition(":")[2]: m for m in of_five}
    assert "SIGKILL" in found["Dies"]["failed"]
    assert found["ring"]["tokens"] == 2 and found["ring"]["stopped_early"]
    assert found["ring"]["setting"]["context"] == 200
    largest = max(entry.elements for entry in Store.open(demo_store).weights)
    assert found["ring"]["setting"]["slots"] == "packed"
    assert found["ring"]["slots_bytes"] < 5 * largest  # less than a byte each
    refused = [m for m in measurements if m["setting"]["cache"] == "1KiB"]
    assert len(refused) == 2 and all("not even one weight" in m["failed"] for m in refused)
