"""The file of results: what was measured, and where, with what and by which command.

One JSON object. ``runs`` are the circumstances of each command that added something;
``measurements`` name the run that they come from. Everything is written at once and whole, so that
a run that is cut off loses at most the setting it was at, and the next one goes on from there.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.arguments import Parser
from common.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
_PACKAGES = ("torch", "transformers", "triton", "accelerate")
_SAME = ("device", "commit", "store")  # of two runs whose measurements can stand for each other


class Results:
    """Measurements made so far, in memory and, if there is a ``path``, in that file."""

    def __init__(self, path: Path | None) -> None:
        """Raises UsageError if there is a file at ``path`` that is none of ours."""
        self._path = path
        self.runs: list[dict[str, Any]] = []
        self.measurements: list[dict[str, Any]] = []
        self._run: dict[str, Any] = {}
        if path is not None and path.exists():
            self._load(path)
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"output {path}: {path.parent} is not a directory")

    def begin(self, circumstances: dict[str, Any]) -> None:
        """What is added from now on was measured under these."""
        self._run = dict(circumstances)

    def has(self, part: str, setting: dict[str, Any], again: bool = False) -> bool:
        """Whether it was measured under the same circumstances; ``again``: failures do not count."""
        found = self._find(part, setting)
        return found is not None and not (again and "failed" in found)

    def add(self, part: str, setting: dict[str, Any], figures: dict[str, Any]) -> None:
        """One finished measurement; it replaces an earlier one of the same setting."""
        earlier = self._find(part, setting)
        if earlier is not None:
            self.measurements.remove(earlier)
        self._enter()
        run = len(self.runs) - 1
        self.measurements.append({"run": run, "part": part, "setting": setting, **figures})
        self._rate(self.measurements[-1])
        self.write()

    def link(self, moment: str, bytes_per_s: float) -> None:
        """The link's bandwidth, measured in this run ``before`` or ``after`` a sweep."""
        self._enter()
        self._run.setdefault("link_bytes_per_s", {})[moment] = bytes_per_s
        for found in self.measurements:
            if self.runs[found["run"]] is self._run:
                self._rate(found)
        self.write()

    def of(self, part: str) -> list[dict[str, Any]]:
        """What was measured in ``part`` and did not fail, on the device and store of the last of it."""
        found = [m for m in self.measurements if m["part"] == part and "failed" not in m]
        if not found:
            return []
        last = self.run_of(found[-1])
        return [m for m in found if all(self.run_of(m)[k] == last[k] for k in ("device", "store"))]

    def run_of(self, measurement: dict[str, Any]) -> dict[str, Any]:
        """The circumstances of a measurement."""
        return self.runs[measurement["run"]]

    def as_json(self) -> str:
        content = {"format": FORMAT, "runs": self.runs, "measurements": self.measurements}
        return json.dumps(content, indent=1) + "\n"

    def write(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            partial.write_text(self.as_json(), encoding="utf-8")
            os.replace(partial, self._path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UsageError(f"output {self._path} cannot be written: {error.strerror}") from error

    def _enter(self) -> None:
        if not any(run is self._run for run in self.runs):
            self.runs.append(self._run)

    def _rate(self, measurement: dict[str, Any]) -> None:
        """The share of the link, against the best of its measurements in the same run."""
        links = self._run.get("link_bytes_per_s")
        if links and "link_bytes_per_s" in measurement:
            share = measurement["link_bytes_per_s"] / max(links.values())
            measurement["link_share"] = round(share, 4)

    def _find(self, part: str, setting: dict[str, Any]) -> dict[str, Any] | None:
        same = [key for key in _SAME if not (key == "store" and part == "ceilings")]
        for found in self.measurements:
            if found["part"] == part and found["setting"] == setting:
                run = self.run_of(found)
                if all(run[key] == self._run[key] for key in same):
                    return found
        return None

    def _load(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
            self.runs, self.measurements = content["runs"], content["measurements"]
            for found in self.measurements:
                _ = found["part"], found["setting"], [self.runs[found["run"]][key] for key in _SAME]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"output {path} is there and is no file of this bench's results ({error!r}):"
                " name another, or remove it"
            ) from error


def add_output(parser: Parser) -> None:
    """The flag that `finish` takes."""
    parser.add_argument("--output", metavar="FILE.json", help="write the result there, too")


def finish(result: dict[str, Any], output: str | None) -> dict[str, Any]:
    """For a measurement that is a file of its own: with its circumstances, and written to ``output``
    if that is given."""
    module = ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)
    where = circumstances(sys.argv[1:], device_name("auto"), "", module)
    record = {"circumstances": where, **result}
    if output:
        Path(output).write_text(json.dumps(record, indent=1) + "\n")
    return record


def circumstances(
    argv: list[str], device: str, store: str, module: str = "bench"
) -> dict[str, Any]:
    """Where, with what and by which command. ``device``: its name; ``store``: what identifies it."""
    return {
        "device": device,
        "store": store,
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *argv]),
        "cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def device_name(device: str) -> str:
    """The name that its maker gave the GPU or the CPU. ``device``: as --device takes it."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device in ("auto", "cuda") else device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit of the sources, with a plus sign if they were changed since."""
    file = ROOT / ".commit"  # where a checkout travels without its history
    if file.is_file():
        return file.read_text().strip()
    try:
        commit = _git("rev-parse", "--short=12", "HEAD").strip()
        return commit + ("+" if _git("status", "--porcelain", "--", "*.py").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
