"""What the bench counts, keeps and draws, apart from what it measures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import descends, forecast, plot
from bench.__main__ import main
from bench.decode import spread
from bench.guard import TookTooLong, limited
from bench.record import Results
from bench.settings import Setting, sweep_settings
from bench.source import Source
from common import int4
from common.errors import PeerError, UsageError, WeightFeederError

ROOT = Path(__file__).resolve().parents[2]
RUN = {"device": "a GPU", "commit": "abc", "store": "123", "command": "python -m bench"}
RING, RESIDENT = Setting("ring", "8").fields(), Setting("resident", "8").fields()


def test_spread() -> None:
    found = spread([float(ms) for ms in (70, 10, 30, 20, 40, 50, 60, 90, 80, 100, 110)])
    assert found["all"][:2] == [70, 10]
    assert {name: found[name] for name in ("median", "min", "p10", "p90", "max")} == {
        "median": 60, "min": 10, "p10": 20, "p90": 100, "max": 110,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(6, 128), (3, 50), (1, 1), (7, 192)])
def test_the_baseline_dequantizes_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(shape, generator=generator) * 1000
    codes, scales = int4.quantize(torch.randn(shape, generator=generator) * scale)
    found = descends.dequantize(codes, scales, shape, dtype)
    expected = int4.dequantize(codes, scales, shape, dtype)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_the_default_sweep_is_what_was_asked_for() -> None:
    found = sweep_settings(("on-demand", "ring", "resident"), None, ("dequantized",), (0,), False)
    assert len(found) == len(set(found)) == 3 * 10 + 2 * 8
    caches = {setting.cache for setting in found if setting.strategy == "on-demand"}
    assert caches == {"1", "2", "4", "8", "16", "32", "64", "128", "256", "-1"}
    assert Setting("resident", "24GiB") in found


def test_the_demo_may_be_asked_for_by_name() -> None:
    demo = Source(None, "demo", large=True)
    assert demo.small and demo.name == "demo"
    default = Source(None, None, large=True)
    assert not default.small and default.name == "qwen2.5-32b"
    with pytest.raises(UsageError, match=r"name one of .*qwen2\.5-32b.*, demo$"):
        Source(None, "b", large=True)


def test_limit_of_the_link() -> None:
    quarter = 16.0 / 64.0
    assert plot.link_limit(50, 16, quarter, 0) == pytest.approx(50 / 16)
    assert plot.link_limit(50, 16, quarter, 32) == pytest.approx(50 / 8)
    assert plot.link_limit(50, 16, 1.0, 12) == pytest.approx(50 / 4)
    assert plot.link_limit(50, 16, quarter, 64) == float("inf")


def test_results_are_kept_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = Results(path)
    first.begin(RUN)
    first.add("sweep", RING, {"tok_per_s": 3.0})
    first.add("sweep", RESIDENT, {"failed": "does not fit"})
    second = Results(path)
    second.begin(RUN | {"command": "another one"})
    assert second.has("sweep", RING)
    assert second.has("sweep", RESIDENT) and not second.has("sweep", RESIDENT, again=True)
    assert not second.has("ttft", RING)
    assert not second.has("sweep", RING | {"context": 100})
    second.add("sweep", RESIDENT, {"tok_per_s": 4.0})
    content = json.loads(path.read_text())
    assert [(m["run"], m.get("tok_per_s")) for m in content["measurements"]] == [(0, 3.0), (1, 4.0)]
    assert [run["command"] for run in content["runs"]] == ["python -m bench", "another one"]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]  # nothing half-written
    for key in ("device", "commit", "store"):
        other = Results(path)
        other.begin(RUN | {key: "another"})
        assert not other.has("sweep", RING), key


def test_share_of_the_better_link(tmp_path: Path) -> None:
    results = Results(None)
    results.begin(dict(RUN))
    results.link("before", 50.0)
    results.add("sweep", RING, {"link_bytes_per_s": 45})
    assert results.measurements[0]["link_share"] == 0.9
    results.link("after", 60.0)
    assert results.measurements[0]["link_share"] == 0.75
    assert results.runs == [RUN | {"link_bytes_per_s": {"before": 50.0, "after": 60.0}}]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "runs": []}'])
def test_a_file_that_is_none_of_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="no file of this bench's results"):
        Results(path)
    assert path.read_text() == text


def endures() -> None:
    """As the engine's client: it keeps what it takes for an error of its own."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            time.sleep(0.01)
        except WeightFeederError:
            pass


PREDICTED = [  # as docs/bench.md has it
    ("dequantized", "ring", "4"), ("dequantized", "ring", "16"), ("dequantized", "resident", "8GiB"),
    ("dequantized", "resident", "12GiB"), ("dequantized", "resident", "24GiB"),
    ("packed", "ring", "1"), ("packed", "ring", "16"), ("packed", "resident", "4GiB"),
    ("packed", "resident", "6900MB"), ("packed", "resident", "256"), ("packed", "resident", "12GiB"),
    ("packed", "resident", "-1"),
]  # fmt: skip


def test_the_plan_was_right_about_the_sweep_that_is_kept() -> None:
    compared = forecast.compare(Results(ROOT / "bench" / "results" / "sweep-32b.json"))
    errors = {
        (s["slots"], s["strategy"], s["cache"]): one["error"]
        for one in compared
        if (s := one["setting"])["context"] <= 64
    }
    for setting in PREDICTED:
        assert abs(errors[setting]) <= 0.1, (setting, errors[setting])


def test_overdue_work_cannot_keep_the_error() -> None:
    with pytest.raises(TookTooLong, match="given up after 0 s"), limited(0.05, lambda: None):
        endures()


def test_the_end_of_a_child_is_seen_by_work_that_endures() -> None:
    child = subprocess.Popen(["sleep", "0.2"])

    def look() -> None:
        if child.poll() is not None:
            raise PeerError("the child has ended")

    with pytest.raises(PeerError, match="the child has ended"), limited(60, look):
        endures()


def test_limited() -> None:
    def look() -> None:
        if gone:
            raise PeerError("it is gone")

    gone: list[bool] = []
    with pytest.raises(TookTooLong, match="given up after 0 s"), limited(0.01, look):
        time.sleep(60)
    with limited(60, look):
        os.kill(os.getpid(), signal.SIGCHLD)  # another child
    gone.append(True)
    with pytest.raises(PeerError), limited(60, look):
        pytest.fail("it was gone before")
    gone.clear()
    with pytest.raises(PeerError, match="it is gone"), limited(60, look):
        gone.append(True)
        os.kill(os.getpid(), signal.SIGCHLD)
        time.sleep(60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


MISTAKES: list[tuple[list[str], str]] = [
    ([], "the following arguments are required: PART"),
    (["swep"], "invalid choice: 'swep'"),
    (["sweep", "--caches=0"], "cache '0' holds no weight"),
    (["sweep", "--tokens=1"], "--tokens 1: expected at least 2"),
    (["ttft", "--prompt-tokens=16,0"], "--prompt-tokens 16,0: expected at least 1"),
    (["ttft", "--prompt-tokens=x"], "argument --prompt-tokens: invalid"),
    (["sweep", "--slots=round"], "slots 'round' are not known"),
    (["sweep", "--time-limit=0"], "--time-limit 0.0: expected above 0"),
    (["sweep", "--strategies=best"], "strategy 'best' is not known"),
    (["baselines", "--descends-cache=0"], "--descends-cache 0: expected from 1, or -1"),
    (["sweep", "--store=a", "--shape=b"], "--store and --shape: give one of them"),
    (["sweep", "--shape=b"], "shape 'b' is not known: name one of qwen2.5-0.5b"),
    (["sweep", "--store=/nowhere"], "/nowhere is not a directory"),
    (["sweep", "--output=/nowhere/x.json"], "/nowhere is not a directory"),
    (["plot"], "the part plot needs --plot FILE.svg"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistakes_are_one_line(argv: list[str], message: str, capfd: Any) -> None:
    try:
        code = main([*argv, "--device=cpu"])
    except SystemExit as ended:
        code = int(str(ended.code))
    err = capfd.readouterr().err
    assert code > 0 and err.count("error: ") == 1 and "Traceback" not in err
    assert message in err.splitlines()[-1]


def test_nothing_to_plot(tmp_path: Path, capfd: Any) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", f"--plot={tmp_path / 'x.svg'}"]) == 2
    assert "there is no sweep to plot" in capfd.readouterr().err


def point(strategy: str, slots_bytes: float, tok_per_s: float) -> dict[str, Any]:
    setting = Setting(strategy, f"{slots_bytes:.0f}B").fields()
    peak = slots_bytes + 2e9
    figures = {"peak_bytes": peak, "slots_bytes": slots_bytes, "tok_per_s": tok_per_s}
    return {"run": 0, "part": "sweep", "setting": setting, **figures}


def test_the_plot_shows_the_link_and_the_baselines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts = {"model": "some-shape", "packed_bytes": 16e9, "dequantized_bytes": 64e9}
    results = Results(None)
    results.runs.append({**RUN, **facts, "link_bytes_per_s": {"start": 50e9, "end": 51.5e9}})
    for strategy in ("ring", "resident"):
        results.measurements += [point(strategy, 4e9, 3.0), point(strategy, 64e9, 16.0)]
    results.measurements.append(
        {
            "run": 0, "part": "baselines", "setting": {"baseline": "offload"}, "peak_bytes": 2e9,
            "tok_per_s": 0.6, "scaled": {"label": "scaled from 8 layers", "tok_per_s": 0.1},
        }
    )  # fmt: skip
    pictures = []
    for name in ("one.svg", "two.svg"):
        plot.plot(results, tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    for text in (
        "a GPU, some-shape, abc", "resident, dequantized slots", "ring, dequantized slots",
        "offload (scaled from 8 layers)", "limit, dequantized slots (51.5 GB/s)",
        "limit, packed slots (51.5 GB/s)",
    ):  # fmt: skip
        assert text in pictures[0], text
    assert "stroke-dasharray" in pictures[0]
    del results.runs[0]["link_bytes_per_s"]
    plot.plot(results, tmp_path / "none.svg")
    assert "limit" not in (tmp_path / "none.svg").read_text()
