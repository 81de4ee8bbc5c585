"""A line on stderr for each measurement, as it is made. The figures themselves are in the file."""

from __future__ import annotations

from typing import Any

from common.config import format_bytes
from common.log import log


def say(part: str, what: str, found: dict[str, Any]) -> None:
    """Say what was found."""
    if "failed" in found:
        log.warning("%s: %s: failed: %s", part, what, found["failed"])
    else:
        log.info("%s: %s: %s", part, what, ", ".join(_texts(found)))


def _texts(found: dict[str, Any]) -> list[str]:
    texts = []
    for name, noun in (("ms_per_token", "a token"), ("ms_to_first_token", "to the first token")):
        if name in found:
            ms = found[name]
            texts.append(f"{ms['median']:.1f} ms {noun} ({ms['min']:.1f} to {ms['max']:.1f})")
    if "tok_per_s" in found:
        texts.append(f"{found['tok_per_s']:.3g} tok/s")
    if "hit_rate" in found:
        texts.append(f"hits {100 * found['hit_rate']:.1f} %")
    for name in ("streamed_bytes_per_token", "bytes_per_token"):
        if name in found:
            texts.append(f"{format_bytes(found[name])} a token")
    if "link_bytes_per_s" in found:
        share = found.get("link_share")
        of_link = "" if share is None else f" ({100 * share:.1f} % of the link)"
        texts.append(f"{found['link_bytes_per_s'] / 1e9:.3g} GB/s{of_link}")
    if "stall_share" in found:
        texts.append(f"stalled {100 * found['stall_share']:.0f} %")
    if "peak_bytes" in found:
        texts.append(f"peak {format_bytes(found['peak_bytes'])}")
    if "scaled" in found:
        scaled = found["scaled"]
        texts.append(f"{scaled['label']}: {scaled['ms_per_token']:.0f} ms")
    for name, noun in (("memory_bytes_per_s", "memory"), ("link_by_piece_bytes_per_s", "link")):
        if found.get(name):
            rate = found[name]
            rate = max(rate.values()) if isinstance(rate, dict) else rate
            texts.append(f"{noun} {rate / 1e9:.4g} GB/s")
    for mark in ("stopped_early", "cut"):
        if found.get(mark):
            texts.append(mark.replace("_", " "))
    return texts
