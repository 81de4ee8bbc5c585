"""Every module is in a package that a wheel takes, and all that a package needs beside modules."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOUND = SETTINGS["tool"]["setuptools"]


def test_all_rooms_are_packed() -> None:
    patterns = FOUND["packages"]["find"]["include"]
    rooms = ("common", "feeder", "engine", "demo", "manual")
    modules = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(modules) > 100
    for path in modules:
        package = path.relative_to(ROOT).parent
        assert any(fnmatch(".".join(package.parts), pattern) for pattern in patterns), path
        assert (ROOT / package / "__init__.py").is_file(), path  # else it is not found
    for other in ("tests", "bench", "docs"):
        assert not any(fnmatch(other, pattern) for pattern in patterns)
    assert FOUND["py-modules"] == ["launch"]


def test_all_data_is_packed() -> None:
    for room in ("common", "feeder", "engine", "manual"):
        for path in (ROOT / room).rglob("*"):
            if path.suffix in (".py", ".pyc") or path.is_dir():
                continue
            package = ".".join(path.relative_to(ROOT).parent.parts)
            patterns = FOUND["package-data"].get(package, [])
            assert any(fnmatch(path.name, pattern) for pattern in patterns), path
    assert SETTINGS["project"]["scripts"] == {"weight-feeder": "launch:script"}
