"""The host's memory and its limits, and what a container may have been denied."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from common.config import format_bytes
from feeder.doctor.finding import Finding, Patient

MEMLOCK_MEND = "ulimit -l unlimited; in Docker --ulimit memlock=-1"
_SYS_PTRACE = 19  # the number of the capability


def locked_limit() -> int | None:
    """Bytes that this process may lock; None if there is no limit."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def memlock(patient: Patient) -> Iterator[Finding]:
    """On a GPU feeder/doctor/device.py says more: it tries."""
    if not patient.on_cuda:
        limit = locked_limit()
        found = "unlimited" if limit is None else f"limit {format_bytes(limit)}"
        yield Finding("ok", "memlock", f"{found}; nothing is page-locked on the CPU")


def memlock_tried(limit: int | None, tried_bytes: int, worked: bool, needed: int) -> Finding:
    """What a limit means, after ``tried_bytes`` were page-locked, or could not be."""
    found = "unlimited" if limit is None else f"limit {format_bytes(limit)}"
    if not worked:
        found = f"{found}, {format_bytes(tried_bytes)} could not be page-locked"
        return Finding("fail", "memlock", found, MEMLOCK_MEND)
    if limit is None:
        return Finding("ok", "memlock", found)
    if tried_bytes > limit:
        return Finding("ok", "memlock", f"{found}, which this driver does not apply")
    if needed > limit:
        found = f"{found}, the model needs {format_bytes(needed)}"
        return Finding("warn", "memlock", found, MEMLOCK_MEND)
    return Finding("ok", "memlock", found)


def shared_memory(patient: Patient) -> Iterator[Finding]:
    from common.shared import SHM_DIRECTORY

    if not SHM_DIRECTORY.is_dir():
        found, free = f"no {SHM_DIRECTORY}", 0
    else:
        free = shutil.disk_usage(SHM_DIRECTORY).free
        found = f"{format_bytes(free)} free; only --keep-store needs it"
    if free < max(patient.packed_bytes, 1):
        needed = format_bytes(patient.packed_bytes) if patient.packed_bytes else "room"
        mend = f"mount -o remount,size=… {SHM_DIRECTORY}; in Docker --shm-size"
        yield Finding("warn", "/dev/shm", f"{found}, and would need {needed}", mend)
    else:
        yield Finding("ok", "/dev/shm", found)


def host_memory(patient: Patient) -> Iterator[Finding]:
    from common.shared import available_host_bytes

    available = available_host_bytes()
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    found = f"{format_bytes(available)} available"
    if limit.isdigit():
        found += f", the container's limit is {format_bytes(int(limit))}"
    if patient.packed_bytes > available:
        needed = format_bytes(patient.packed_bytes)
        mend = "free memory, or give the container more (docker run --memory)"
        yield Finding("fail", "RAM", f"{found}, the model needs {needed}", mend)
    elif patient.packed_bytes:
        needed = format_bytes(patient.packed_bytes)
        yield Finding("ok", "RAM", f"{found}, the model needs {needed}")
    else:
        yield Finding("ok", "RAM", f"{found}; --model DIR compares that with a model")


def container(patient: Patient) -> Iterator[Finding]:
    """What the two processes, and debuggers, ask of the kernel."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        yield Finding("ok", "pidfd", "can be opened")
    except OSError as error:
        mend = "a kernel from 5.3, and a seccomp profile that allows pidfd_open"
        yield Finding("fail", "pidfd", f"pidfd_open: {error.strerror}", mend)
    status = _text("/proc/self/status")
    yield ptrace(_text("/proc/sys/kernel/yama/ptrace_scope"), status)
    mapped = _text("/proc/self/uid_map").split()
    if mapped and mapped != ["0", "0", "4294967295"]:
        yield Finding("ok", "user ids", "mapped, as in a rootless container")


def ptrace(scope: str, status: str) -> Finding:
    """Whether a debugger may attach to a running process. ``status``: of /proc/self/status."""
    capable = any(
        line.startswith("CapEff:") and int(line.split()[1], 16) >> _SYS_PTRACE & 1
        for line in status.splitlines()
    )
    level = int(scope) if scope.strip().isdigit() else 0
    if level == 0 or (capable and level < 3):
        return Finding("ok", "ptrace", "debuggers may attach")
    if level == 1:
        return Finding(
            "ok", "ptrace", "debuggers may attach to what they start (--debug, --debugpy)"
        )
    mend = "sysctl kernel.yama.ptrace_scope=1; in Docker --cap-add SYS_PTRACE"
    return Finding("warn", "ptrace", f"debuggers may not attach (yama level {level})", mend)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
