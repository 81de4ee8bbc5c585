"""The plan: what it says of figures that were made up, and when it warns."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from common.plan import Capacity, Plan
from common.quality import Quality
from feeder import plan_text
from feeder.forecast import (
    LAUNCH_US,
    Forecast,
    Subject,
    Surroundings,
    beside_products_s,
    forecast,
    hardware,
)
from feeder.measure import Measured
from feeder.simulation import ENGINE_US, FUSED_SHARE, Hardware, Traffic
from feeder.strategies.registry import make_strategy
from feeder.topology import PcieLink

MIB = 1 << 20
CONFIG = {"num_hidden_layers": 2, "hidden_size": 100, "intermediate_size": 300}
MEASURED = Measured("Some GPU", link=10e9, device=1e12, matmul=1e14, launch_s=5e-6)
GPU = Surroundings("cuda", MEASURED, PcieLink(3, 16, 3, 16), node=0, far_share=0.0)


def subject(slots: int, count: int = 20, all_fit: bool = False) -> Subject:
    elements = [16 * MIB] * count
    sizes = [32 * MIB] * count
    plan = Plan(tuple(range(count)))
    capacity = Capacity(slots, slots * 32 * MIB)
    return Subject(
        "some-store", plan, sizes, Traffic.of(elements, sizes), CONFIG, capacity, all_fit
    )


def told(what: Subject, strategy: str, around: Surroundings = GPU) -> tuple[Any, ...]:
    machine = hardware(around, staging_bytes=0)
    return what, strategy, around, forecast(what, lambda: make_strategy(strategy), machine)


def test_hosts_are_scaled_by_how_fast_they_launch() -> None:
    assert hardware(GPU, 77).staging_bytes == 77
    usual = LAUNCH_US["cuda"] * 1e-6
    for factor in (0.5, 1.0, 3.0):
        measured = dataclasses.replace(MEASURED, launch_s=factor * usual)
        machine = hardware(dataclasses.replace(GPU, measured=measured), 0)
        assert machine.engine_s == pytest.approx(factor * ENGINE_US * 1e-6)
        assert (machine.link, machine.device, machine.matmul) == (10e9, 1e12, 1e14)


def test_what_a_prefill_does_beside_its_products() -> None:
    machine = Hardware(link=1, device=1e9, matmul=1e9)
    attention = 4 * 50 * 50 * 100 * 2 / 1e9
    elementwise = 50 * 2 * (120 * 100 + 10 * 300) / 1e9
    assert beside_products_s(CONFIG, 50, machine) == pytest.approx(attention + elementwise)
    assert beside_products_s(CONFIG, 0, machine) == 0


def test_a_streamed_model_in_words() -> None:
    lines = plan_text.lines(*told(subject(6), "ring"))
    assert lines[0] == (
        "some-store, 173 MB packed in 20 weights; Some GPU: link 10 GB/s (PCIe 3 x16),"
        " memory 1000 GB/s, MPS off"
    )
    assert lines[1] == (
        "ring, 201 MB of slots: 0 weights resident (0 B packed), 20 weights streamed"
        " (173 MB a token)"
    )
    # 20 x 8.65 MB at 10 GB/s are 17.3 ms, at which the host needs 2.8.
    assert lines[2].startswith("about 57.8 tok/s (17.3 ms a token), first token of 16 / 512 / 4096")
    assert " s (the first prompt 0.4 s more); the limit is " in lines[2]
    assert lines[2].endswith("; the limit is the link (100 % busy)")
    assert len(lines) == 3


def test_a_quality_that_was_measured_in_words() -> None:
    quality = Quality(0.0016, 0.0055, 124.8, 124.7, 0.941, 8192, "held-out.txt", "0" * 32)
    what = dataclasses.replace(subject(6), method="gptq", quality=quality)
    assert plan_text.lines(*told(what, "ring"))[1] == f"quantized by gptq: {quality}"
    fields = plan_text.as_json(*told(what, "ring"))
    assert (fields["method"], fields["quality"]["kl_mean"]) == ("gptq", 0.0016)
    assert plan_text.as_json(*told(subject(6), "ring"))["quality"] is None


def test_a_resident_model_in_words() -> None:
    mps = dataclasses.replace(GPU, mps=True)
    lines = plan_text.lines(*told(subject(20), "resident", mps))
    assert lines[0].endswith(", MPS on")
    assert "20 weights resident (173 MB packed), 0 weights streamed (0 B a token)" in lines[1]
    assert lines[2].startswith("about 574 tok/s (1.7")
    assert lines[2].endswith("; the limit is host time of the engine (98 % busy)")


def test_mps_is_named_where_it_would_help() -> None:
    """Where slots are filled from copies on the device, two processes take turns there all the time."""
    near = dataclasses.replace(subject(4), copies=frozenset(range(20)))
    (hint,) = plan_text.warnings(*told(near, "ring"))
    assert hint.startswith("MPS would save about ") and "nvidia-cuda-mps-control -d" in hint
    assert plan_text.warnings(*told(near, "ring", dataclasses.replace(GPU, mps=True))) == []
    assert plan_text.warnings(*told(subject(4), "ring")) == []  # the link is the limit


def test_part_of_a_model_stays() -> None:
    found = plan_text.as_json(*told(subject(13), "resident"))["predicted"]
    assert (found["resident_weights"], found["streamed_weights"]) == (5, 15)
    assert found["resident_packed_bytes"] == 5 * 8650752
    assert found["streamed_bytes"] == pytest.approx(15 * 8650752)
    assert found["ms_per_token"] == pytest.approx(15 * 8650752 / 10e9 * 1000, rel=0.05)


def test_too_few_slots_are_a_limit_of_their_own() -> None:
    lines = plan_text.lines(*told(subject(1), "on-demand"))
    assert "; the limit is the number of slots, then the link (" in lines[2]


def test_the_longest_prompt_is_set_by_products() -> None:
    found = told(subject(6), "ring")[3]
    flops = 2 * 20 * 16 * MIB
    # The engine was idle: six slots are full, and the rest takes the link's time.
    assert 14 * 8650752 / 10e9 <= found.ttft_s[16] <= 17 * 8650752 / 10e9
    assert found.ttft_s[4096] == pytest.approx(4096 * flops / 1e14, rel=0.1)
    assert found.ttft_s[16] <= found.ttft_s[512] <= found.ttft_s[4096]


def test_a_prompt_takes_a_forward_pass_where_a_token_is_one_launch() -> None:
    elements, sizes = [16 * MIB] * 20, [9 * MIB] * 20
    what = Subject(
        "some-store", Plan(tuple(range(20))), sizes, Traffic.of(elements, sizes, range(20)), CONFIG,
        Capacity(20, sum(sizes)), all_fit=True,
    )  # fmt: skip
    machine = hardware(GPU, 0, what)
    found = forecast(what, lambda: make_strategy("resident"), machine)
    assert machine.engine_s == 0 < machine.prompt_s
    assert found.steady.seconds == pytest.approx(20 * 8650752 / (FUSED_SHARE * 1e12), rel=0.01)
    assert found.ttft_s[16] == pytest.approx(20 * machine.prompt_s, rel=0.05)


def test_on_the_cpu_there_is_no_link() -> None:
    around = Surroundings("cpu", dataclasses.replace(MEASURED, device_name="CPU", dequantize=1e9))
    lines = plan_text.lines(*told(subject(6), "ring", around))
    assert lines[0].endswith("CPU: dequantizer 1 GB/s, memory 1000 GB/s")
    assert lines[2].endswith(" s; the limit is the dequantizer (100 % busy)")


def test_what_was_not_measured_is_not_predicted() -> None:
    around = Surroundings("cuda", None)
    lines = plan_text.lines(subject(6), "ring", around, None)
    assert lines == [
        "some-store, 173 MB packed in 20 weights, on cuda; nothing could be measured",
        "ring: 201 MB of slots",
    ]
    fields = plan_text.as_json(subject(6), "ring", around, None)
    assert (fields["measured"], fields["predicted"]) == (None, None)


def warned(what: Subject, strategy: str = "ring", **changes: Any) -> list[str]:
    return plan_text.warnings(*told(what, strategy, dataclasses.replace(GPU, **changes)))


def test_nothing_to_warn_of() -> None:
    assert warned(subject(6)) == []
    assert warned(subject(20, all_fit=True)) == []
    assert warned(subject(6), pcie=None, far_share=None, node=None) == []
    assert warned(subject(6), far_share=0.05) == []


def test_everything_would_fit() -> None:
    (line,) = warned(subject(6, all_fit=True))
    assert line.startswith("everything would fit: 671 MB of slots for all 20 weights")
    assert line.endswith("leave --cache out")


def test_a_link_that_is_slower_than_the_card() -> None:
    (line,) = warned(subject(6), pcie=PcieLink(3, 8, 4, 16))
    assert line.startswith("the link runs as PCIe 3 x8, the card has PCIe 4 x16:")


def test_a_store_on_the_far_node() -> None:
    (line,) = warned(subject(6), far_share=0.62, node=1)
    assert line.startswith("62 % of the host store lies far from the GPU, which is at NUMA node 1:")
    assert line.endswith("numactl --cpunodebind=1 --membind=1")


def test_json_holds_all_that_the_lines_say() -> None:
    of = told(subject(6, all_fit=True), "ring")
    fields = json.loads(json.dumps(plan_text.as_json(*of)))
    assert fields["packed_bytes"] == 20 * 8650752
    assert fields["measured"]["link"] == 10e9
    assert fields["pcie"] == {
        "generation": 3, "width": 16, "max_generation": 3, "max_width": 16,
    }  # fmt: skip
    assert fields["warnings"] == plan_text.warnings(*of)
    predicted, found = fields["predicted"], of[3]
    assert isinstance(found, Forecast)
    assert predicted["tok_per_s"] == pytest.approx(1000 / predicted["ms_per_token"])
    assert predicted["ttft_s"] == {str(n): s for n, s in found.ttft_s.items()}
    assert (predicted["limit"], predicted["limit_share"]) == found.limit


@pytest.mark.parametrize(
    ("count", "size_bytes", "said"),
    [
        (4, 1000, "all 4 weights in 1 kB"),
        (9, 1000, "all 4 weights in 1 kB"),
        (4, 999, "as many of 4 weights as fit in 999 B"),
        (9, 400, "as many of 4 weights as fit in 400 B"),
        (2, 700, "2 weights in 700 B"),
        (1, 400, "1 weight in 400 B"),
    ],
)
def test_no_more_weights_are_said_than_the_bytes_hold(
    count: int, size_bytes: int, said: str
) -> None:
    assert plan_text.room_text(Capacity(count, size_bytes), [100, 200, 300, 400]) == said
