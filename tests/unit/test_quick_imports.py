"""What is hidden from imports is so only meanwhile, and only if nobody has it already."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.quick_imports import quick_imports
from engine.start import UNUSED

ROOT = Path(__file__).resolve().parents[2]
IMPORT = """
import sys
from engine.start import UNUSED, import_libraries
import_libraries()
import transformers
transformers.Qwen2ForCausalLM
print(sorted(name for name in sys.modules if name.partition(".")[0] in UNUSED))
import {package}
print({package}.answer)
"""


@pytest.mark.parametrize("package", UNUSED)
def test_transformers_imports_nothing_that_is_unused(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("answer = 42\n")
    # Transformers asks for versions of what seems to be installed.
    metadata = tmp_path / f"{package}-99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 99.0\n")
    run = subprocess.run(
        [sys.executable, "-c", IMPORT.format(package=package)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split("\n")[:2] == ["[]", "42"]


def test_what_is_imported_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("had_before", "hidden_now"):
        (tmp_path / f"{name}.py").write_text(f"name = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    had = importlib.import_module("had_before")
    with quick_imports(("had_before", "hidden_now")):
        assert importlib.import_module("had_before") is had
        assert importlib.util.find_spec("hidden_now") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("hidden_now")
    assert importlib.import_module("hidden_now").name == "hidden_now"


def test_collection_goes_on_as_before() -> None:
    with pytest.raises(KeyError), quick_imports():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
