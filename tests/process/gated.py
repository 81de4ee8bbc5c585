"""``python -m tests.process.gated GATE MODULE DEVICE``: a process that was started ahead of its use.

Imports what takes long, and opens the device, waits for the file GATE, a JSON list of flags, and goes on as
``python -m MODULE FLAGS``.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import time
from pathlib import Path

SLOW = {
    "feeder": ["feeder.__main__", "feeder.start"],
    "engine": ["engine.__main__", "engine.start", "engine.generate", "engine.model"],
}

if __name__ == "__main__":
    gate, module, device = Path(sys.argv[1]), *sys.argv[2:]
    for name in SLOW[module]:
        importlib.import_module(name)
    if device != "cpu":
        import torch

        torch.zeros(1, device=device)
    while not gate.exists():
        time.sleep(0.002)
    sys.argv[1:] = json.loads(gate.read_text())
    del sys.modules[f"{module}.__main__"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
