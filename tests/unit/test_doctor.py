"""What the doctor makes of what it finds. tests/process/test_doctor.py has it look for itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from feeder.doctor.device import compute_mode_finding, link_findings, mps_finding
from feeder.doctor.finding import Finding, Patient, findings
from feeder.doctor.host import MEMLOCK_MEND, memlock_tried, ptrace
from feeder.doctor.software import requirement, requirements
from feeder.topology import PcieLink

MB, GB = 10**6, 10**9


def test_a_line() -> None:
    assert str(Finding("ok", "RAM", "24 GB")) == "ok    RAM             24 GB"
    line = str(Finding("warn", "MPS", "not running", "start it"))
    assert line == "warn  MPS             not running; to mend: start it"
    assert "\n" not in line


@pytest.mark.parametrize("level", ["warn", "fail"])
def test_what_is_not_well_has_a_mend(level: str) -> None:
    with pytest.raises(ValueError, match="says what to do"):
        Finding(level, "RAM", "none")  # type: ignore[arg-type]


def test_a_check_that_breaks_is_a_finding_and_stops_no_other() -> None:
    def some_check(patient: Patient) -> Iterator[Finding]:
        yield Finding("ok", "first", patient.device)
        raise RuntimeError("two\nlines")

    def other(patient: Patient) -> Iterator[Finding]:
        yield Finding("ok", "other", "")

    found = list(findings([some_check, other], Patient("cpu")))
    assert [(f.level, f.name) for f in found] == [
        ("ok", "first"), ("fail", "some check"), ("ok", "other"),
    ]  # fmt: skip
    assert found[1].found == "cannot be checked: RuntimeError: two lines"


@pytest.mark.parametrize(
    ("limit", "tried", "worked", "needed", "level", "text"),
    [
        (None, 256 * MB, True, 16 * GB, "ok", "unlimited"),
        (None, 256 * MB, False, 0, "fail", "unlimited, 256 MB could not be page-locked"),
        (8 * MB, 264 * MB, True, 16 * GB, "ok", "limit 8 MB, which this driver does not apply"),
        (8 * MB, 264 * MB, False, 0, "fail", "limit 8 MB, 264 MB could not be page-locked"),
        (4 * GB, 256 * MB, True, 16 * GB, "warn", "limit 4 GB, the model needs 16 GB"),
        (4 * GB, 256 * MB, True, 3 * GB, "ok", "limit 4 GB"),
    ],
)
def test_limits_of_locked_memory(
    limit: int | None, tried: int, worked: bool, needed: int, level: str, text: str
) -> None:
    found = memlock_tried(limit, tried, worked, needed)
    assert (found.level, found.found) == (level, text)
    assert found.mend == ("" if level == "ok" else MEMLOCK_MEND)


WITHOUT, WITH = "CapEff:\t0000000000000000", "CapEff:\t00000000a80c25fb"


@pytest.mark.parametrize(
    ("scope", "status", "level", "text"),
    [
        ("", WITHOUT, "ok", "debuggers may attach"),
        ("0\n", WITHOUT, "ok", "debuggers may attach"),
        ("1\n", WITH, "ok", "debuggers may attach"),
        ("1\n", WITHOUT, "ok", "debuggers may attach to what they start"),
        ("2\n", WITHOUT, "warn", "debuggers may not attach (yama level 2)"),
        ("2\n", WITH, "ok", "debuggers may attach"),
        ("3\n", WITH, "warn", "debuggers may not attach (yama level 3)"),
    ],
)
def test_debuggers(scope: str, status: str, level: str, text: str) -> None:
    found = ptrace(scope, f"Name:\tpython\n{status}\nSeccomp:\t2\n")
    assert found.level == level
    assert found.found.startswith(text)


@pytest.mark.parametrize(
    ("mode", "mps", "level"),
    [(0, False, "ok"), (0, True, "ok"), (3, True, "ok"), (3, False, "fail"), (2, True, "fail")],
)
def test_compute_modes(mode: int, mps: bool, level: str) -> None:
    assert compute_mode_finding(mode, mps).level == level


def test_mps() -> None:
    assert mps_finding(True, False).level == "ok"
    assert mps_finding(False, True).mend == "nvidia-cuda-mps-control -d"
    assert mps_finding(False, False).mend.endswith("is not on the PATH")


@pytest.mark.parametrize(
    ("gb_per_s", "pcie", "levels", "text"),
    [
        (52.5, PcieLink(5, 16, 5, 16), ["ok", "ok"], "5 x16, as the card has it"),
        (25.0, PcieLink(4, 16, 5, 16), ["ok", "warn"], "PCIe 4 x16, the card has PCIe 5 x16"),
        (12.0, PcieLink(5, 16, 5, 16), ["warn", "ok"], "5 x16, as the card has it"),
        (3.0, None, ["ok", "ok"], "generation and width are not told here"),
    ],
)
def test_links(gb_per_s: float, pcie: PcieLink | None, levels: list[str], text: str) -> None:
    found = list(link_findings(gb_per_s * 1e9, pcie))
    assert [finding.level for finding in found] == levels
    assert [finding.name for finding in found] == ["pinned memory", "PCIe"]
    assert found[0].found.startswith(f"{gb_per_s:.3g} GB/s")
    assert found[1].found == text


def test_requirements() -> None:
    met = requirement("pytest>=1")
    assert isinstance(met, str) and met.startswith("pytest ")
    old = requirement("pytest>=1,<2")
    assert isinstance(old, Finding) and old.level == "fail"
    assert old.found.endswith(", expected <2,>=1") and "-m pip install 'pytest<2,>=1'" in old.mend
    missing = requirement("no-such-package-of-ours>=1")
    assert isinstance(missing, Finding) and missing.found.startswith("not installed")
    assert requirement("no-such-package-of-ours>=1; platform_system == 'Windows'") == ""
    python, packages = requirements()
    assert python.startswith(">=3")
    assert any(text.startswith("torch>=") for text in packages)
