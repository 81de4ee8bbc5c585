"""What a run will be like, told before it starts: tok/s, time to the first token, and what limits them.

Pure: figures in, lines out. feeder/outlook.py finds the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.config import format_bytes
from common.plan import Capacity, Plan
from feeder.measure import Measured
from feeder.scheduler import Scheduler
from feeder.simulation import ENGINE_US, Hardware, Simulation, Steady, Traffic
from feeder.strategies.base import Strategy
from feeder.topology import FAR_SHARE, PcieLink

PROMPTS = (16, 512, 4096)  # tokens
#: Host time of one small operation where ENGINE_US was measured; other hosts are scaled by it.
LAUNCH_US = {"cuda": 5.0, "cpu": 2.6}
#: The engine's host time for a weight on the CPU, where a launch is also the work.
ENGINE_CPU_US = 135.0
#: The first prompt loads kernels: on an H100 it took so much longer than a pass.
FIRST_PROMPT_S = 0.4
#: Bytes that the parts beside the products move on the device, for each token and layer, by element
#: of a hidden state and of the MLP's: norms in fp32, rotary positions, residuals; the activation.
HIDDEN_TRAFFIC, MLP_TRAFFIC = 120, 10
BUSY_SHARE = 0.85  # of a token: what is busy for less does not set the figure by itself


@dataclass(frozen=True)
class Subject:
    """What is to be run: the model and the slots it gets."""

    store: str
    plan: Plan
    sizes: Sequence[int]  # bytes of each weight in its slot
    traffic: Traffic
    config: Mapping[str, Any]
    capacity: Capacity
    all_fit: bool  # whether every weight would find a slot if the cache were -1


@dataclass(frozen=True)
class Surroundings:
    """What it runs on. ``far_share``: of the host store, beyond the GPU's NUMA node."""

    device: str  # cuda or cpu
    measured: Measured | None
    pcie: PcieLink | None = None
    node: int | None = None
    far_share: float | None = None
    mps: bool = False


@dataclass(frozen=True)
class Forecast:
    """``ttft_s``: by tokens of the prompt, of an engine that has answered before."""

    steady: Steady
    ttft_s: Mapping[int, float]
    engine_s: float

    @property
    def latency_bound(self) -> bool:
        """Nothing is busy throughout: slots are too few, and the parts wait for each other."""
        return self.limit[1] < BUSY_SHARE and bool(self.steady.streamed)

    @property
    def limit(self) -> tuple[str, float]:
        """What is busy longest, and for which share of a token."""
        steady = self.steady
        busy = {
            "the link": steady.link_s,
            "device memory": steady.device_s,
            "host time of the engine": steady.host_s,
        }
        name = max(busy, key=lambda part: busy[part])
        return name, min(1.0, busy[name] / steady.seconds)


def hardware(around: Surroundings, staging_bytes: int) -> Hardware:
    """The simulation's figures of this machine. Only where it was measured."""
    measured = around.measured
    assert measured is not None
    engine_us = ENGINE_US if around.device == "cuda" else ENGINE_CPU_US
    slower = measured.launch_s * 1e6 / LAUNCH_US[around.device]
    return Hardware(
        link=measured.link,
        device=measured.device,
        matmul=measured.matmul,
        engine_s=engine_us * 1e-6 * slower,
        staging_bytes=staging_bytes,
    )


def forecast(subject: Subject, strategy: Strategy, machine: Hardware) -> Forecast:
    """``strategy``: a fresh one, which the simulation may use up."""
    scheduler = Scheduler(subject.plan, subject.sizes, subject.capacity, strategy)
    simulation = Simulation(scheduler, subject.traffic, machine)
    simulation.attach()
    steady = simulation.steady()
    ttft_s = {}
    for tokens in PROMPTS:
        beside = beside_products_s(subject.config, tokens, machine)
        ttft_s[tokens] = simulation.run(1, tokens) + beside
        simulation.run(1)
    return Forecast(steady, ttft_s, machine.engine_s)


def beside_products_s(config: Mapping[str, Any], tokens: int, machine: Hardware) -> float:
    """Device time of a prefill of ``tokens`` that is spent on attention, norms and activations.

    Attention counts as if it were not causal, since it runs at about half the speed of a product.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    attention = 4 * tokens**2 * hidden * layers / machine.matmul
    elements = HIDDEN_TRAFFIC * hidden + MLP_TRAFFIC * config["intermediate_size"]
    return attention + tokens * layers * elements / machine.device


# Lines ----------------------------------------------------------------------------------------


def lines(subject: Subject, strategy: str, around: Surroundings, found: Forecast | None) -> list[str]:
    """The plan for people, without a prefix."""
    told = [_machine_line(subject, around)]
    if found is None:
        return [*told, f"{strategy}: {format_bytes(subject.capacity.size_bytes)} of slots"]
    packed, streamed = subject.traffic.packed, found.steady.streamed
    resident = [weight for weight in subject.plan.order if weight not in streamed]
    resident_bytes = sum(packed[weight] for weight in resident)
    told.append(
        f"{strategy}, {format_bytes(subject.capacity.size_bytes)} of slots:"
        f" {_weights(len(resident))} resident ({format_bytes(resident_bytes)} packed),"
        f" {_weights(len(streamed))} streamed"
        f" ({format_bytes(found.steady.streamed_bytes)} a token)"
    )
    name, share = found.limit
    ttft = " / ".join(_seconds(found.ttft_s[tokens]) for tokens in PROMPTS)
    prompts = " / ".join(map(str, PROMPTS))
    limit = f"{name} ({100 * share:.0f} % busy)"
    if found.latency_bound:
        limit = f"the number of slots, then {limit}"
    told.append(
        f"about {1 / found.steady.seconds:.3g} tok/s ({1000 * found.steady.seconds:.3g} ms a token),"
        f" first token of {prompts} after {ttft} s; the limit is {limit}"
    )
    return told


def warnings(subject: Subject, strategy: str, around: Surroundings, found: Forecast | None) -> list[str]:
    """What could be mended, one line each."""
    told = []
    left_out = found is not None and found.steady.streamed
    if subject.all_fit and (left_out or subject.capacity.size_bytes < sum(subject.sizes)):
        told.append(
            f"everything would fit: {format_bytes(sum(subject.sizes))} of slots for all"
            f" {len(subject.sizes)} weights, and the cache leaves some out: give --cache -1"
        )
    pcie = around.pcie
    if pcie is not None and pcie.reduced:
        told.append(
            f"the link runs as PCIe {pcie.generation} x{pcie.width}, the card has PCIe"
            f" {pcie.max_generation} x{pcie.max_width}: look at the slot, the riser and the BIOS"
        )
    if around.far_share is not None and around.far_share > FAR_SHARE:
        node = around.node
        told.append(
            f"{100 * around.far_share:.0f} % of the host store lies far from the GPU, which is at"
            f" NUMA node {node}: start with numactl --cpunodebind={node} --membind={node}"
        )
    return told


def as_json(
    subject: Subject, strategy: str, around: Surroundings, found: Forecast | None
) -> dict[str, Any]:
    """The same for programs, with all that was measured."""
    fields: dict[str, Any] = {
        "store": subject.store,
        "weights": len(subject.sizes),
        "packed_bytes": sum(subject.traffic.packed),
        "strategy": strategy,
        "slots": subject.capacity.count,
        "arena_bytes": subject.capacity.size_bytes,
        "all_fit": subject.all_fit,
        "device": around.device,
        "mps": around.mps,
        "measured": asdict(around.measured) if around.measured else None,
        "pcie": asdict(around.pcie) if around.pcie else None,
        "far_share": around.far_share,
        "warnings": warnings(subject, strategy, around, found),
        "predicted": None,
    }
    if found is not None:
        steady = found.steady
        name, share = found.limit
        streamed_weights_bytes = sum(subject.traffic.packed[weight] for weight in steady.streamed)
        fields["predicted"] = {
            "tok_per_s": 1 / steady.seconds,
            "ms_per_token": 1000 * steady.seconds,
            "hit_rate": steady.hits,
            "resident_weights": len(subject.plan) - len(steady.streamed),
            "resident_packed_bytes": sum(subject.traffic.packed) - streamed_weights_bytes,
            "streamed_weights": len(steady.streamed),
            "streamed_bytes": steady.streamed_bytes,
            "ttft_s": {str(tokens): seconds for tokens, seconds in found.ttft_s.items()},
            "first_prompt_extra_s": FIRST_PROMPT_S if around.device == "cuda" else 0.0,
            "limit": name,
            "limit_share": share,
            "link_ms": 1000 * steady.link_s,
            "device_ms": 1000 * steady.device_s,
            "host_ms": 1000 * steady.host_s,
        }
    return fields


def _machine_line(subject: Subject, around: Surroundings) -> str:
    packed = format_bytes(sum(subject.traffic.packed))
    told = f"{subject.store}, {packed} packed in {_weights(len(subject.sizes))}"
    measured = around.measured
    if measured is None:
        return f"{told}, on {around.device}; nothing could be measured"
    pcie = f" ({around.pcie})" if around.pcie else ""
    link = "link" if around.device == "cuda" else "dequantizer"  # nothing else is between, there
    told += (
        f"; {measured.device_name}: {link} {measured.link / 1e9:.3g} GB/s{pcie},"
        f" memory {measured.device / 1e9:.4g} GB/s"
    )
    if around.device == "cuda":
        told += f", MPS {'on' if around.mps else 'off'}"
    return told


def _weights(count: int) -> str:
    return f"{count} weight{'' if count == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 1 else f"{seconds:.3g}"
