"""Texts of nvidia-smi, sysfs and /proc, and what is read from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from feeder.topology import PcieLink, pages_by_node, parse_smi, pcie_from_sysfs


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("5, 5, 16, 16\n", PcieLink(5, 16, 5, 16)),
        ("1, 4, 16, 16\n", PcieLink(1, 16, 4, 16)),
        ("3, 4, 8, 16", PcieLink(3, 8, 4, 16)),
        ("[N/A], 4, 16, 16\n", None),
        ("[Not Supported], [Not Supported], [Not Supported], [Not Supported]\n", None),
        ("4, 4, 16, 16\n4, 4, 16, 16\n", None),  # two cards: which is it?
        ("0, 4, 0, 16\n", None),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_what_nvidia_smi_says(text: str, link: PcieLink | None) -> None:
    assert parse_smi(text) == link


@pytest.mark.parametrize(
    ("speed", "width", "max_speed", "max_width", "link"),
    [
        ("32.0 GT/s PCIe", "16", "32.0 GT/s PCIe", "16", PcieLink(5, 16, 5, 16)),
        ("8.0 GT/s PCIe", "8", "16.0 GT/s PCIe", "16", PcieLink(3, 8, 4, 16)),
        ("2.5 GT/s", "16", "8 GT/s", "16", PcieLink(1, 16, 3, 16)),
        ("Unknown", "0", "Unknown", "255", None),
        ("16.0 GT/s PCIe", "63", "8.0 GT/s PCIe", "16", None),  # more than it can
        ("17.0 GT/s PCIe", "16", "32.0 GT/s PCIe", "16", None),  # no generation
        ("16.0 GT/s PCIe", "", "16.0 GT/s PCIe", "16", None),
    ],
)
def test_what_sysfs_says(
    tmp_path: Path, speed: str, width: str, max_speed: str, max_width: str, link: PcieLink | None
) -> None:
    files = {
        "current_link_speed": speed, "current_link_width": width,
        "max_link_speed": max_speed, "max_link_width": max_width,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert pcie_from_sysfs(tmp_path) == link
    assert pcie_from_sysfs(tmp_path / "no-such-card") is None


def test_a_link_below_what_the_card_has() -> None:
    assert not PcieLink(4, 16, 4, 16).reduced
    assert PcieLink(3, 16, 4, 16).reduced
    assert PcieLink(4, 8, 4, 16).reduced
    assert str(PcieLink(4, 8, 5, 16)) == "PCIe 4 x8"
    assert PcieLink(4, 8, 5, 16).gb_per_s == pytest.approx(15.75, rel=0.01)
    assert PcieLink(9, 8, 9, 16).gb_per_s is None


NUMA_MAPS = """\
55d6c8a00000 default file=/usr/bin/python3.11 mapped=5 mapmax=3 N0=5 kernelpagesize_kB=4
7f0000000000 default anon=12 dirty=12 N0=2 N1=10 kernelpagesize_kB=4
7f1200000000 default file=/memfd:weight-feeder-store\\040(deleted) dirty=300 N0=100 N1=200 \
kernelpagesize_kB=4
7fe000000000 default
7fff00000000 default stack anon=3 dirty=3 N10=3 kernelpagesize_kB=4
"""


@pytest.mark.parametrize(
    ("address", "pages"),
    [
        (0x7F1200000000, {0: 100, 1: 200}),
        (0x7F1200001000, {0: 100, 1: 200}),  # within the mapping
        (0x7F0000000000, {0: 2, 1: 10}),
        (0x7FE000000000, {}),
        (0x7FFF00000000, {10: 3}),
        (0x1000, {}),
    ],
)
def test_where_pages_lie(address: int, pages: dict[int, int]) -> None:
    assert pages_by_node(NUMA_MAPS, address) == pages
    assert pages_by_node("", address) == {}
