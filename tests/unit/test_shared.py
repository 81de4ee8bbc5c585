"""How much host memory there is: what a container's limit leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.shared import container_bytes

GB = 10**9
STAT = """anon {anon}
file {file}
kernel 7000000
shmem {shmem}
inactive_anon 5000
active_anon {anon}
inactive_file {inactive}
active_file {active}
unevictable 0
workingset_refault_file 12345
"""


def cgroup(path: Path, limit: str, used: int, **stat: int) -> Path:
    sizes = dict.fromkeys(("anon", "file", "shmem", "inactive", "active"), 0) | stat
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(STAT.format(**sizes))
    return path


def test_a_store_in_the_page_cache_is_no_shortage(tmp_path: Path) -> None:
    stat = {"anon": GB, "file": 17 * GB, "inactive": 12 * GB, "active": 4 * GB, "shmem": GB}
    place = cgroup(tmp_path, str(20 * GB), 19 * GB, **stat)
    assert container_bytes(place) == 17 * GB


def test_what_programs_hold_is_used(tmp_path: Path) -> None:
    """Their own memory, and what is shared, which is no page cache."""
    place = cgroup(tmp_path, str(20 * GB), 15 * GB, anon=5 * GB, file=10 * GB, shmem=10 * GB)
    assert container_bytes(place) == 5 * GB


@pytest.mark.parametrize("missing", ["memory.max", "memory.current", "memory.stat"])
def test_without_a_limit_there_is_none(tmp_path: Path, missing: str) -> None:
    place = cgroup(tmp_path, "max", 15 * GB)
    assert container_bytes(place) > 1 << 60
    cgroup(place, str(20 * GB), 15 * GB)
    assert container_bytes(place) == 5 * GB
    (place / missing).unlink()
    assert container_bytes(place) > 1 << 60
