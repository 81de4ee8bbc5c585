"""Whether memory of one process can be mapped by another: tried with a real one.

This process makes a segment as the feeder does; ``python -m feeder.doctor.sharing`` maps it as the
engine does, and says what it read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from common.errors import WeightFeederError
from feeder.doctor.finding import Finding, Patient

SEGMENT_BYTES = 1 << 20
_PATIENCE_S = 120.0
_MEND = {
    "cuda": "start both in one container (or with --pid=host --ipc=host); under WSL CUDA cannot"
    " share memory between processes",
    "cpu": "start both as one user in one container, with /proc not mounted hidepid, and no limit"
    " on file sizes (ulimit -f unlimited)",
}


def sharing(patient: Patient) -> Iterator[Finding]:
    if patient.on_cuda:
        import torch

        if not torch.cuda.is_available():
            return  # the check of the driver has said so
    mend = _MEND["cuda" if patient.on_cuda else "cpu"]
    try:
        answer = _try(patient.device)
    except (WeightFeederError, OSError) as error:
        yield Finding("fail", "sharing", f"a segment cannot be made: {error}", mend)
        return
    if answer.get("same") is True:
        found = f"another process read {answer['kind']} memory of this one"
        yield Finding("ok", "sharing", found)
    else:
        why = answer.get("error", "it read other bytes")
        yield Finding("fail", "sharing", f"another process cannot read this one's: {why}", mend)
    if "parent" in answer and answer["parent"] != os.getpid():
        mend = "start both in one pid namespace (docker run --pid=host for both)"
        yield Finding("fail", "pids", "parent and child see different pids", mend)


def _try(device: str) -> dict[str, Any]:
    import torch

    from common.memory import memory_for

    memory = memory_for(device)
    segment = memory.allocate(SEGMENT_BYTES)
    try:
        segment.tensor[:SEGMENT_BYTES].copy_(
            torch.frombuffer(bytearray(_pattern()), dtype=torch.uint8)
        )
        if memory.device.type == "cuda":
            torch.cuda.synchronize(memory.device)
        told = {"device": memory.identity, "kind": segment.kind, "handle": segment.handle.hex()}
        return {"kind": segment.kind} | _ask(told)
    finally:
        segment.close()


def _ask(told: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "feeder.doctor.sharing"]
    try:
        done = subprocess.run(
            command, input=json.dumps(told), capture_output=True, text=True,
            timeout=_PATIENCE_S, check=False,
        )  # fmt: skip
        answer = json.loads(done.stdout or "null")
    except (subprocess.TimeoutExpired, ValueError) as error:
        return {"error": f"it does not answer ({type(error).__name__})"}
    if isinstance(answer, dict):
        return answer
    last = (done.stderr.strip() or "no word").splitlines()[-1]
    return {"error": f"it ended with code {done.returncode}: {last[:200]}"}


def _pattern() -> bytes:
    return bytes((7 * i + (i >> 8)) & 255 for i in range(4096)) * (SEGMENT_BYTES // 4096)


def main() -> int:
    """The other process. Reads what it is told from stdin, answers on stdout, each one JSON object."""
    from common.memory import memory_for

    told = json.load(sys.stdin)
    answer: dict[str, Any] = {"parent": os.getppid()}
    try:
        memory = memory_for(told["device"])
        segment = memory.open(told["kind"], bytes.fromhex(told["handle"]), SEGMENT_BYTES)
        read = segment.tensor[:SEGMENT_BYTES].cpu()  # on a device a segment is whole pages
        answer["same"] = bytes(read.numpy()) == _pattern()
        segment.close()
    except Exception as error:
        answer["error"] = " ".join(f"{error or type(error).__name__}".split())[:300]
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
