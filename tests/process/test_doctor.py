"""launch.py doctor as a real process, on this machine and on one that was made worse."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.checkpoints import edit_config, make_checkpoint
from tests.processes import DEMO, PATIENCE_S, ROOT, Room, assert_refused


def checked(out: str) -> dict[str, dict[str, Any]]:
    """Findings by name, of --json."""
    answer = json.loads(out)
    found = {check["name"]: check for check in answer["checks"]}
    assert len(found) == len(answer["checks"])
    assert answer["ok"] == all(check["level"] != "fail" for check in answer["checks"])
    assert all(check["level"] == "ok" or check["mend"] for check in answer["checks"])
    return found


def test_this_machine(room: Room, demo_store: Path, tmp_path: Path) -> None:
    huge = make_checkpoint(tmp_path / "huge")
    size = {"num_hidden_layers": 4096, "intermediate_size": 1 << 24, "vocab_size": 1 << 24}
    edit_config(huge, **size, layer_types=None, max_window_layers=4096)
    plain = room.launch("doctor", "--device=cpu")
    as_json = [
        room.launch("doctor", "--device=cpu", "--json", *flags)
        for flags in ([], [f"--model={DEMO}"], [f"--model={demo_store}"], [f"--model={huge}"])
    ]

    ended = plain.wait()  # lines for people
    assert ended.code == 0, ended.out
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert all(line[:6].strip() in ("ok", "warn") for line in lines), ended.out
    names = [line[6:20].strip() for line in lines]
    for name in ("python", "packages", "RAM", "/dev/shm", "memlock", "pidfd", "ptrace", "sharing"):
        assert name in names, ended.out

    without, *small, large = (process.wait() for process in as_json)
    found = checked(without.out)
    assert [*found] == names
    assert found["sharing"]["found"] == "another process read shm memory of this one"
    assert found["packages"]["found"].startswith("torch ")
    assert "the model needs" not in found["RAM"]["found"]

    for ended in small:  # a model is compared with memory
        assert ended.code == 0, ended.out
        ram = checked(ended.out)["RAM"]
        assert ram["found"].endswith("the model needs 1.65 MB"), ram
    assert large.code == 1
    found = checked(large.out)
    assert (found["RAM"]["level"], found["/dev/shm"]["level"]) == ("fail", "warn")
    assert "the model needs" in found["RAM"]["found"]


def test_mistakes(room: Room, tmp_path: Path) -> None:
    ended = room.launch("doctor", "--model=/no/such/model").wait()
    assert_refused(ended, "model /no/such/model is no directory", code=2)
    ended = room.launch("doctor", f"--model={tmp_path}").wait()
    assert_refused(ended, "expected a model's config", code=1)
    assert_refused(room.launch("doctor", "--fast").wait(), "--fast", code=2)


def worse(limit: Callable[[], None], *flags: str) -> subprocess.CompletedProcess[str]:
    """The doctor in a process with other limits; its output is a pipe, which no limit concerns."""
    return subprocess.run(
        [sys.executable, "launch.py", "doctor", "--device=cpu", "--json", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False, preexec_fn=limit,
    )  # fmt: skip


def test_no_file_may_grow() -> None:
    done = worse(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    found = checked(done.stdout)
    assert done.returncode == 1
    assert found["sharing"]["level"] == "fail"
    assert "File too large" in found["sharing"]["found"]
    assert "ulimit -f unlimited" in found["sharing"]["mend"]
    assert [name for name, check in found.items() if check["level"] == "fail"] == ["sharing"]


def test_little_memory_may_be_locked() -> None:
    done = worse(lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536)))
    found = checked(done.stdout)
    assert done.returncode == 0  # on the CPU nothing is
    assert found["memlock"]["found"].startswith("limit 65.5 kB;")
