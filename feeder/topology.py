"""How the GPU is joined to this machine: its PCIe link, its NUMA node, and where host memory lies.

Reads sysfs, /proc and nvidia-smi; allocates nothing and asks no driver. What cannot be known is None.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")
#: One way, GB/s a lane, by generation: what the link could do before anything is lost on it.
LANE_GB_PER_S = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
_GENERATION = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}  # by GT/s
_SMI_FIELDS = tuple(
    f"pcie.link.{what}.{when}" for what in ("gen", "width") for when in ("current", "max")
)
FAR_SHARE = 0.1  # of the host store on other nodes, above which it is worth a line


@dataclass(frozen=True)
class PcieLink:
    """As it runs now, and as the card has it."""

    generation: int
    width: int
    max_generation: int
    max_width: int

    @property
    def reduced(self) -> bool:
        return self.generation < self.max_generation or self.width < self.max_width

    @property
    def gb_per_s(self) -> float | None:
        """What the link as it runs could carry one way."""
        lane = LANE_GB_PER_S.get(self.generation)
        return lane * self.width if lane else None

    def __str__(self) -> str:
        return f"PCIe {self.generation} x{self.width}"


def pcie_link(address: str) -> PcieLink | None:
    """The link of the card at a PCI address such as ``0000:1b:00.0``. A card that idles lowers its
    generation: ask right after copies."""
    if not address:
        return None
    directory = SYSFS / "bus" / "pci" / "devices" / address.lower()
    return pcie_from_sysfs(directory) or _pcie_from_smi(address)


def pcie_from_sysfs(directory: Path) -> PcieLink | None:
    """From the files of a PCI device; None if they are not there or say nothing."""
    values = []
    for name in ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width"):
        text = _text(directory / name)
        number = re.match(r"\d+(\.\d+)?", text)
        if number is None:
            return None
        value = float(number[0])
        values.append(_GENERATION.get(value, 0) if name.endswith("speed") else int(value))
    generation, width, max_generation, max_width = values
    if not (0 < generation <= max_generation and 0 < width <= max_width):
        return None  # as a virtual machine may show it
    return PcieLink(generation, width, max_generation, max_width)


def parse_smi(text: str) -> PcieLink | None:
    """From one line of nvidia-smi's CSV without header: generation now and at most, width likewise."""
    fields = [field.strip() for field in text.strip().split(",")]
    if len(fields) != len(_SMI_FIELDS) or not all(field.isdigit() for field in fields):
        return None  # "[N/A]", an error, or several lines
    generation, max_generation, width, max_width = map(int, fields)
    return PcieLink(generation, width, max_generation, max_width) if generation and width else None


def nvidia_smi(fields: tuple[str, ...], which: str = "") -> str:
    """What nvidia-smi says of ``fields``, as CSV; "" if there is none or it fails. ``which``: a PCI
    address or UUID."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, *([f"--id={which}"] if which else [])],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def gpu_node(address: str) -> int | None:
    """The NUMA node of the card at that PCI address."""
    if not address:
        return None
    text = _text(SYSFS / "bus" / "pci" / "devices" / address.lower() / "numa_node").strip()
    return int(text) if text.isdigit() else None  # -1: the machine does not say


def several_nodes() -> bool:
    text = _text(SYSFS / "devices" / "system" / "node" / "online").strip()
    return bool(re.search(r"[,-]", text))


def pages_by_node(numa_maps: str, start: int) -> dict[int, int]:
    """Pages on each NUMA node of the mapping that holds the address ``start``, from the text of
    /proc/PID/numa_maps, whose lines are in order of address."""
    found = ""
    for line in numa_maps.splitlines():
        address = line.partition(" ")[0]
        if not re.fullmatch(r"[0-9a-f]+", address) or int(address, 16) > start:
            break
        found = line
    return {int(node): int(count) for node, count in re.findall(r"\bN(\d+)=(\d+)\b", found)}


def far_share(start: int, node: int | None) -> float | None:
    """The share of the mapping at ``start`` that lies on other nodes than ``node``."""
    if node is None or not several_nodes():
        return None
    pages = pages_by_node(_text(Path("/proc/self/numa_maps")), start)
    total = sum(pages.values())
    return 1 - pages.get(node, 0) / total if total else None


def _pcie_from_smi(address: str) -> PcieLink | None:
    return parse_smi(nvidia_smi(_SMI_FIELDS, address))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
