"""The GPU: driver, memory, compute mode, MPS, and how fast page-locked memory reaches it."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common.config import format_bytes
from feeder import topology
from feeder.doctor.finding import Finding, Patient
from feeder.doctor.host import MEMLOCK_MEND, locked_limit, memlock_tried

if TYPE_CHECKING:
    from common.memory import CudaMemory

PINNED_BYTES = 256 << 20
PINNED_LIMIT = 1 << 30  # a memlock limit below this is tried out
SLOW_SHARE = 0.6  # of what the link as it runs could carry
COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}


def device_for(asked: str) -> str:
    """``cpu`` or a CUDA device, as a run with ``--device asked`` would take it."""
    if asked != "auto":
        return asked
    try:
        import torch

        return "cuda" if torch.cuda.is_available() or _has_gpu() else "cpu"
    except ImportError:
        return "cuda" if _has_gpu() else "cpu"


def driver(patient: Patient) -> Iterator[Finding]:
    """Whether torch can use a GPU at all."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if not patient.on_cuda:
        yield Finding(
            "ok", "driver", f"no GPU; torch {torch.__version__} ({build}) runs on the CPU"
        )
        return
    said = topology.nvidia_smi(("driver_version",)).split("\n")[0].strip() or "unknown"
    found = f"driver {said}, torch {torch.__version__} built for {build}"
    if torch.cuda.is_available():
        yield Finding("ok", "driver", found)
    elif not torch.version.cuda:
        mend = "install a CUDA build of torch (pytorch.org, Get Started), or use --device cpu"
        yield Finding("fail", "driver", found, mend)
    else:
        mend = "a newer driver or a torch for this one; in Docker --gpus all; or use --device cpu"
        yield Finding("fail", "driver", f"{found}: {_why_not()}", mend)


def gpus(patient: Patient) -> Iterator[Finding]:
    if not _usable(patient):
        return
    import torch

    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        name = f"{about.name}: {format_bytes(free)} of {format_bytes(total)} free"
        if free < total // 20:
            mend = "end what holds it (nvidia-smi lists processes), or choose another --device"
            yield Finding("warn", f"cuda:{index}", name, mend)
        else:
            yield Finding("ok", f"cuda:{index}", name)


def compute_mode(patient: Patient) -> Iterator[Finding]:
    if not _usable(patient):
        return
    from feeder.mps import mps_running

    memory = _memory(patient)
    attribute = memory.driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_MODE
    device = memory.call(memory.driver.cuDeviceGet, memory.device.index)
    mode = int(memory.call(memory.driver.cuDeviceGetAttribute, attribute, device))
    yield compute_mode_finding(mode, mps_running())


def compute_mode_finding(mode: int, mps: bool) -> Finding:
    """Two processes share the GPU: an exclusive one lets them only through MPS."""
    name = COMPUTE_MODES.get(mode, str(mode))
    if mode == 0 or (mode == 3 and mps):
        return Finding("ok", "compute mode", name)
    found = f"{name}: feeder and engine cannot both use the GPU"
    return Finding("fail", "compute mode", found, "nvidia-smi -c DEFAULT (as root), or start MPS")


def mps(patient: Patient) -> Iterator[Finding]:
    if _usable(patient):
        from feeder.mps import CONTROL, mps_running

        yield mps_finding(mps_running(), shutil.which(CONTROL) is not None)


def mps_finding(running: bool, installed: bool) -> Finding:
    if running:
        return Finding("ok", "MPS", "running; feeder and engine use it")
    found = (
        "not running; it would help: without it, dequantizing and the engine's kernels take turns"
    )
    where = "" if installed else ", which comes with the driver and is not on the PATH"
    return Finding("warn", "MPS", found, f"nvidia-cuda-mps-control -d{where}")


def link(patient: Patient) -> Iterator[Finding]:
    """Page-locks memory and copies from it, then asks how the link ran."""
    if not _usable(patient):
        return
    from common.errors import MemoryShortageError
    from common.shared import SharedMemory
    from feeder.measure import link_bandwidth
    from feeder.outlook import pci_address

    memory, limit = _memory(patient), locked_limit()
    size = PINNED_BYTES
    if limit is not None and limit < PINNED_LIMIT:
        size += limit
    shared = SharedMemory.create(size, "doctor")
    try:
        shared.tensor.fill_(1)
        try:
            unpin = memory.pin(shared.tensor)
        except MemoryShortageError:
            yield memlock_tried(limit, size, False, patient.packed_bytes)
            found = f"{format_bytes(size)} of host memory cannot be page-locked"
            yield Finding("fail", "pinned memory", found, MEMLOCK_MEND)
            return
        try:
            bytes_per_s = link_bandwidth(shared.tensor, memory)
            pcie = topology.pcie_link(pci_address(memory))
        finally:
            unpin()
    finally:
        shared.close()
    yield memlock_tried(limit, size, True, patient.packed_bytes)
    yield from link_findings(bytes_per_s, pcie)


def link_findings(bytes_per_s: float, pcie: topology.PcieLink | None) -> Iterator[Finding]:
    """Of the bandwidth from page-locked memory, and of the link that it went over."""
    found = f"{bytes_per_s / 1e9:.3g} GB/s to the device"
    could = pcie.gb_per_s if pcie else None
    if could and bytes_per_s < SLOW_SHARE * could * 1e9:
        mend = "end what else uses the link; on several sockets numactl --cpunodebind to the GPU's"
        yield Finding("warn", "pinned memory", f"{found}, {pcie} could {could:.3g}", mend)
    else:
        yield Finding("ok", "pinned memory", found)
    if pcie is None:
        yield Finding("ok", "PCIe", "generation and width are not told here")
    elif pcie.reduced:
        found = f"{pcie}, the card has PCIe {pcie.max_generation} x{pcie.max_width}"
        mend = "another slot, no riser, and the BIOS' setting of the slot's generation"
        yield Finding("warn", "PCIe", found, mend)
    else:
        yield Finding("ok", "PCIe", str(pcie).removeprefix("PCIe ") + ", as the card has it")


def _memory(patient: Patient) -> CudaMemory:
    from common.memory import CudaMemory, memory_for

    memory = memory_for(patient.device)
    assert isinstance(memory, CudaMemory)
    return memory


def _usable(patient: Patient) -> bool:
    if not patient.on_cuda:
        return False
    import torch

    return torch.cuda.is_available()  # if not, ``driver`` has said so


def _has_gpu() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*")) or bool(topology.nvidia_smi(("name",)))


def _why_not() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return " ".join(str(error).split())[:200]
    return "no GPU can be seen"
