"""Who may import whom: the rules of docs/architecture.md, read off the sources themselves."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("common", "feeder", "engine")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
#: The device work that only one module may ask for, by any of its names.
IPC = re.compile(r"cu(da)?Ipc|CUipc|reduce_tensor|_share_cuda|_new_shared_cuda|rebuild_cuda")


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules that a source imports, at its top or anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 40
    assert "zmq" in rooms_of(ROOT / "common" / "channel.py")
    assert IPC.search((ROOT / "common" / "memory.py").read_text(encoding="utf-8"))
    assert "feeder.strategies.base.Strategy" in imported(ROOT / "feeder" / "scheduler.py")


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_keeps_to_its_room(path: Path) -> None:
    room, rooms = path.relative_to(ROOT).parts[0], rooms_of(path)
    forbidden = {"common": {"feeder", "engine"}, "feeder": {"engine"}, "engine": {"feeder"}}
    assert not rooms & (forbidden[room] | {"launch", "tests", "demo", "bench", "manual"})
    assert ("zmq" in rooms) == (path == ROOT / "common" / "channel.py")
    names = set(imported(path))
    assert any(name.startswith("cuda.") for name in names) == (
        path == ROOT / "common" / "memory.py"
    )
    if path != ROOT / "common" / "memory.py":
        assert not IPC.search(path.read_text(encoding="utf-8"))
    assert not rooms & {"pickle", "cloudpickle", "dill", "marshal"}
    assert "torch.multiprocessing" not in names


@pytest.mark.parametrize("path", sorted((ROOT / "feeder" / "strategies").glob("*.py")), ids=named)
def test_strategies_are_pure(path: Path) -> None:
    """The standard library, ``common`` and each other; and of those nothing that acts."""
    for name in imported(path):
        room = name.partition(".")[0]
        if room == "feeder":
            assert name.startswith("feeder.strategies")
        elif room == "common":
            assert name.startswith(("common.plan", "common.errors", "common.config"))
        else:
            assert room in sys.stdlib_module_names
            assert room not in {"socket", "subprocess", "threading", "time", "random", "ctypes"}


@pytest.mark.parametrize("name", ["scheduler", "arena"])
def test_the_scheduler_is_pure(name: str) -> None:
    for found in imported(ROOT / "feeder" / f"{name}.py"):
        room = found.partition(".")[0]
        assert room in {"common", "feeder"} or room in sys.stdlib_module_names
        assert room not in {"time", "random", "threading", "os", "socket"}


#: What is started often, or must not have a CUDA context, and what it may never import.
LIGHT = [
    ("launch", {"torch", "zmq", "numpy", "transformers", "triton", "feeder", "engine"}),
    ("feeder.control", {"torch", "numpy", "transformers", "triton", "engine"}),
    ("feeder.scheduler", {"torch", "zmq", "numpy", "triton", "msgpack", "engine"}),
    ("feeder.strategies.registry", {"torch", "zmq", "numpy", "triton", "msgpack", "engine"}),
    ("feeder.simulation", {"torch", "zmq", "numpy", "triton", "msgpack", "engine"}),
    ("feeder.doctor.__main__", {"torch", "zmq", "transformers", "triton", "engine"}),
    ("common.supervise", {"torch", "zmq", "numpy"}),
    ("common.trace", {"torch", "zmq", "numpy"}),
    ("engine.prompts", {"torch", "zmq", "feeder"}),
    ("engine.client", {"feeder", "transformers", "triton"}),
    ("feeder.serve", {"engine", "transformers"}),
]


@pytest.mark.parametrize(("module", "forbidden"), LIGHT)
def test_what_an_import_brings_along(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert module.partition(".")[0] in loaded
    assert not loaded & forbidden


@pytest.mark.parametrize(
    "command", [["launch.py"], ["-m", "feeder"], ["-m", "engine"], ["-m", "bench"]]
)
def test_help_comes_without_torch(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "usage: " in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "transformers", "triton", "zmq"}
