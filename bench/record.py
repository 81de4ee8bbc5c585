"""What every measurement carries: device, versions, command, commit."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
import triton

ROOT = Path(__file__).resolve().parent.parent


def finish(result: dict[str, Any], output: str | None) -> dict[str, Any]:
    """``result`` with its circumstances; written to ``output`` as JSON if that is given."""
    record = {"circumstances": circumstances(), **result}
    if output:
        Path(output).write_text(json.dumps(record, indent=1) + "\n")
    return record


def circumstances() -> dict[str, str]:
    """Where, with what and by which command a measurement was made."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": _commit(),
    }


def _module() -> str:
    return ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)


def _commit() -> str:
    file = ROOT / ".commit"  # where a checkout travels without its history
    if file.is_file():
        return file.read_text().strip()
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
