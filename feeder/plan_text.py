"""The plan in words and as JSON: what is run on what, what to expect, what could be mended.

Pure: figures in, lines out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from common.config import format_bytes
from common.plan import Capacity
from feeder.forecast import FIRST_PROMPT_S, PROMPTS, Forecast, Subject, Surroundings
from feeder.topology import FAR_SHARE

MPS_GAIN = 0.1  # of a token, above which it is worth a line


def lines(
    subject: Subject, strategy: str, around: Surroundings, found: Forecast | None
) -> list[str]:
    """The plan for people, without a prefix."""
    told = [_machine_line(subject, around)]
    if subject.quality is not None:
        told.append(f"quantized by {subject.method or 'a method unknown'}: {subject.quality}")
    if subject.draft is not None:
        draft = subject.draft
        told.append(
            f"draft model {draft.store}, {format_bytes(draft.packed_bytes)} packed in"
            f" {_weights(draft.weights)}: resident in {format_bytes(draft.slot_bytes)} of slots of its"
            " own; what it saves is not reckoned with"
        )
    if found is None:
        return [*told, f"{strategy}: {format_bytes(subject.capacity.size_bytes)} of slots"]
    packed, streamed = subject.traffic.packed, found.steady.streamed
    resident = [weight for weight in subject.plan.order if weight not in streamed]
    resident_bytes = sum(packed[weight] for weight in resident)
    told.append(
        f"{strategy}, {format_bytes(subject.capacity.size_bytes)} of slots{_copies(subject)}:"
        f" {_weights(len(resident))} resident ({format_bytes(resident_bytes)} packed),"
        f" {_weights(len(streamed))} streamed"
        f" ({format_bytes(found.steady.streamed_bytes)} a token)"
    )
    name, share = found.limit
    on_cuda = around.device == "cuda"
    if name == "device memory" and not on_cuda:
        name = "the dequantizer"
    ttft = " / ".join(_seconds(found.ttft_s[tokens]) for tokens in PROMPTS)
    prompts = " / ".join(map(str, PROMPTS))
    limit = f"{name} ({100 * share:.0f} % busy)"
    if found.latency_bound:
        limit = f"the number of slots, then {limit}"
    first = f" (the first prompt {FIRST_PROMPT_S:g} s more)" if on_cuda else ""
    told.append(
        f"about {1 / found.steady.seconds:.3g} tok/s ({1000 * found.steady.seconds:.3g} ms a token),"
        f" first token of {prompts} after {ttft} s{first}; the limit is {limit}"
    )
    return told


def warnings(
    subject: Subject, strategy: str, around: Surroundings, found: Forecast | None
) -> list[str]:
    """What could be mended, one line each."""
    told = []
    left_out = found is not None and found.steady.streamed
    if subject.all_fit and (left_out or subject.capacity.size_bytes < sum(subject.sizes)):
        told.append(
            f"everything would fit: {format_bytes(sum(subject.sizes))} of slots for all"
            f" {len(subject.sizes)} weights, and the cache leaves some out: leave --cache out"
        )
    if found is not None and found.mps_gain > MPS_GAIN:
        told.append(
            f"MPS would save about {100 * found.mps_gain:.0f} % of each token, which two processes lose by"
            " taking turns on the device: start it with nvidia-cuda-mps-control -d"
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
        "method": subject.method,
        "quality": subject.quality.as_json() if subject.quality else None,
        "strategy": strategy,
        "slots": subject.capacity.count,
        "arena_bytes": subject.capacity.size_bytes,
        "copies": len(subject.copies),
        "all_fit": subject.all_fit,
        "beside_slots": subject.beside,
        "draft": asdict(subject.draft) if subject.draft else None,
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
    link = f"link {measured.link / 1e9:.3g} GB/s{pcie}"
    if around.device == "cpu":
        link = f"dequantizer {measured.dequantize / 1e9:.3g} GB/s"
    told += f"; {measured.device_name}: {link}, memory {measured.device / 1e9:.4g} GB/s"
    if around.device == "cuda":
        told += f", MPS {'on' if around.mps else 'off'}"
    return told


def _copies(subject: Subject) -> str:
    if not subject.copies:
        return ""
    size = sum(subject.traffic.packed[weight] for weight in subject.copies)
    return f" and {format_bytes(size)} of packed copies"


def _weights(count: int) -> str:
    return f"{count} weight{'' if count == 1 else 's'}"


def room_text(capacity: Capacity, sizes: Sequence[int]) -> str:
    """How much may be in slots at once: the bytes, and the number of weights where that is what bounds."""
    room, total = format_bytes(capacity.size_bytes), len(sizes)
    if capacity.holds(sizes):
        return f"all {_weights(total)} in {room}"
    if capacity.count >= total:
        return f"as many of {_weights(total)} as fit in {room}"
    return f"{_weights(capacity.count)} in {room}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 1 else f"{seconds:.3g}"
