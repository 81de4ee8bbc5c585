"""What a run will be like: tok/s, time to the first token, and what limits them.

Pure arithmetic on figures that feeder/outlook.py finds; feeder/plan_text.py puts the result in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.plan import Capacity, Plan
from common.quality import Quality
from feeder.measure import Measured
from feeder.scheduler import Scheduler
from feeder.simulation import (
    ENGINE_US,
    FORWARD_US,
    TURN_US,
    Hardware,
    Simulation,
    Steady,
    Traffic,
    engine_us,
    forward_us,
)
from feeder.strategies.base import Strategy
from feeder.topology import PcieLink

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
    all_fit: bool  # whether every weight would find a slot if the cache allowed it
    method: str | None = None  # how it was quantized, if its store says so
    quality: Quality | None = None  # against its original, if that was measured
    beside: str = ""  # what both processes take of the device beside the slots, part by part
    copies: frozenset[int] = frozenset()  # weights of which a packed copy stays on the device
    draft: Draft | None = None


@dataclass(frozen=True)
class Draft:
    """A draft model, which is resident beside the slots."""

    store: str
    weights: int
    packed_bytes: int
    slot_bytes: int


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
    """``ttft_s``: by tokens of the prompt, of an engine that has answered before. ``mps_gain``: the share of
    a token that MPS would save."""

    steady: Steady
    ttft_s: Mapping[int, float]
    engine_s: float
    mps_gain: float = 0.0

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


def hardware(around: Surroundings, staging_bytes: int, subject: Subject | None = None) -> Hardware:
    """The simulation's figures of this machine. Only where it was measured. ``subject``: what runs."""
    measured = around.measured
    assert measured is not None
    token_us, prompt_us = ENGINE_CPU_US, ENGINE_CPU_US
    if around.device == "cuda":
        token_us, prompt_us = (ENGINE_US, FORWARD_US) if subject is None else _engine_us(subject)
    slower = measured.launch_s * 1e6 / LAUNCH_US[around.device]
    return Hardware(
        link=measured.link,
        device=measured.device,
        matmul=measured.matmul,
        engine_s=token_us * 1e-6 * slower,
        prompt_s=prompt_us * 1e-6 * slower,
        staging_bytes=staging_bytes,
        dequantize=measured.dequantize,
        turn_s=0.0 if around.mps or around.device != "cuda" else TURN_US * 1e-6,
    )


def _engine_us(subject: Subject) -> tuple[float, float]:
    """For each weight, of a token and of a prompt."""
    packed = not any(subject.traffic.moved)
    stays = subject.capacity.holds(subject.sizes)
    return engine_us(packed, stays), forward_us(packed)


def forecast(subject: Subject, make: Callable[[], Strategy], machine: Hardware) -> Forecast:
    """``make``: gives a fresh strategy, which a simulation may use up."""
    simulation = _simulation(subject, make(), machine)
    steady = simulation.steady()
    ttft_s = {}
    for tokens in PROMPTS:
        beside = beside_products_s(subject.config, tokens, machine)
        simulation.idle()
        ttft_s[tokens] = simulation.run(1, tokens) + beside
    gain = 0.0
    if machine.turn_s and subject.copies:  # else the link is the limit, or nobody takes turns
        under_mps = _simulation(subject, make(), replace(machine, turn_s=0.0)).steady()
        gain = max(0.0, 1 - under_mps.seconds / steady.seconds)
    return Forecast(steady, ttft_s, machine.engine_s, gain)


def _simulation(subject: Subject, strategy: Strategy, machine: Hardware) -> Simulation:
    scheduler = Scheduler(
        subject.plan, subject.sizes, subject.capacity, strategy,
        copies=subject.copies, link_bytes=list(subject.traffic.packed),
    )  # fmt: skip
    simulation = Simulation(scheduler, subject.traffic, machine)
    simulation.attach()
    return simulation


def beside_products_s(config: Mapping[str, Any], tokens: int, machine: Hardware) -> float:
    """Device time of a prefill of ``tokens`` that is spent on attention, norms and activations.

    Attention counts as if it were not causal, since it runs at about half the speed of a product.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    attention = 4 * tokens**2 * hidden * layers / machine.matmul
    elements = HIDDEN_TRAFFIC * hidden + MLP_TRAFFIC * config["intermediate_size"]
    return attention + tokens * layers * elements / machine.device
