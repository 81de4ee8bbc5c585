"""Whether NVIDIA's Multi-Process Service runs. CUDA finds it by itself; here it is only looked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"


def mps_running() -> bool:
    """By what its control daemon keeps in the directory that CUDA would look in."""
    directory = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    if not (directory / "control").exists():
        return False
    try:
        pid = int((directory / f"{CONTROL}.pid").read_text())
        return Path(f"/proc/{pid}").exists() or _answers()  # it may be in another container
    except (OSError, ValueError):
        return _answers()


def _answers() -> bool:
    try:
        done = subprocess.run(
            [CONTROL], input=b"get_server_list\n", capture_output=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
