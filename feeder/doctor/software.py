"""Python, packages, the compiler that Triton calls, flash-attn. Imports none of what it asks after."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

from feeder.doctor.finding import Finding, Patient

_PROJECT = "weight-feeder"
_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def python(patient: Patient) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    found, wanted = platform.python_version(), requirements()[0]
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding("ok", "python", f"{found} at {sys.executable}")
    else:
        mend = "make the environment with a newer one, python3.12 -m venv .venv"
        yield Finding("fail", "python", f"{found}, expected {wanted}", mend)


def packages(patient: Patient) -> Iterator[Finding]:
    """What pyproject.toml asks for, in the ranges that it gives."""
    well = []
    for text in requirements()[1]:
        finding = requirement(text)
        if isinstance(finding, Finding):
            yield finding
        elif finding:
            well.append(finding)
    yield Finding("ok", "packages", ", ".join(well))


def requirement(text: str) -> Finding | str:
    """Of one requirement such as ``torch>=2.8,<2.14``: name and version if it is met, "" if it is
    not for this platform."""
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return ""
    mend = f"{sys.executable} -m pip install '{wanted.name}{wanted.specifier}'"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("fail", wanted.name, f"not installed, expected {wanted.specifier}", mend)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding("fail", wanted.name, f"{version}, expected {wanted.specifier}", mend)
    return f"{wanted.name} {version}"


def requirements() -> tuple[str, list[str]]:
    """Python's range and the packages', from pyproject.toml or from what was installed from it."""
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    about = importlib.metadata.metadata(_PROJECT)
    return about["Requires-Python"], importlib.metadata.requires(_PROJECT) or []


def compiler(patient: Patient) -> Iterator[Finding]:
    """Triton compiles its launcher with the host's C compiler, at the first kernel."""
    if not patient.on_cuda:
        yield Finding("ok", "C compiler", "not needed on the CPU")
        return
    found = os.environ.get("CC") or next(filter(shutil.which, ("clang", "gcc", "cc")), "")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not found or shutil.which(found.split()[0]) is None:
        mend = "apt-get install gcc, or set CC to a C compiler"
        yield Finding("fail", "C compiler", f"{found or 'none'} found, Triton needs one", mend)
    elif not header.is_file():
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        mend = f"apt-get install {version}-dev"
        yield Finding("fail", "C compiler", f"{found}, but no {header}, which Triton needs", mend)
    else:
        yield Finding("ok", "C compiler", found)


def flash_attention(patient: Patient) -> Iterator[Finding]:
    if importlib.util.find_spec("flash_attn") is None:
        found = "not installed: torch's own attention is used (docs/running.md, flash-attn)"
        yield Finding("ok", "flash-attn", found)
    else:
        version = importlib.metadata.version("flash-attn")
        used = "" if patient.on_cuda else ", not used on the CPU"
        yield Finding("ok", "flash-attn", f"{version}{used}")
