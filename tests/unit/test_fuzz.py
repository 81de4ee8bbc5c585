"""Stores and checkpoints that were damaged, ten thousand of them: refused in one line, or loaded rightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

#: Other seeds, or more cases, for whoever wants to look further.
CASES = int(os.environ.get("WEIGHT_FEEDER_FUZZ_CASES", "10000"))
SEED = int(os.environ.get("WEIGHT_FEEDER_FUZZ_SEED", "1"))


def test_damage_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    """Bits flipped in every file of a store are found and named; tests/fuzz.py says what else is done."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", str(tmp_path), str(CASES), str(SEED)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=CASES,  # of a case that never ends; each takes a millisecond or two
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    counts = json.loads(ended.stdout)
    assert sum(sum(kinds.values()) for kinds in counts.values()) == CASES // 10 * 10
    assert counts["flips"] == {"refused": CASES // 10 * 4}
    for kind in (
        "store",
        "old store",
        "checkpoint",
    ):  # not everything is refused, or harmless
        assert 0 < counts[kind]["the same"] < counts[kind]["refused"]
