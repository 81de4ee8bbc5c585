"""Figures for people: the live line on a terminal, the summary at the end. Everything on stderr."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import threading
import time
from typing import Any

from common.config import format_bytes
from common.errors import WeightFeederError
from common.log import fields, is_json, log
from engine.client import WeightClient
from engine.generate import Answer

_INTERVAL_S = 0.5
_STATUS_INTERVAL_S = 0.25  # what a feeder that is killed may not have told of what it streamed


class Report:
    """Collects what a run did. ``with`` it round the generation; then ``summary``."""

    def __init__(self, client: WeightClient) -> None:
        self._client = client
        self._answers: list[Answer] = []
        self._seconds: float | None = None
        self._tokens = 0
        client.ask_status()
        self._streamed_before = client.streamed_bytes
        self._next_status = 0.0
        self._stall_s = client.stats.stall_s
        self._start = time.perf_counter()
        self._live: _LiveLine | None = None

    def token(self) -> None:
        self._tokens += 1
        now = time.perf_counter()
        if now >= self._next_status:
            self._next_status = now + _STATUS_INTERVAL_S
            self._client.request_status()

    def add(self, answer: Answer) -> None:
        self._answers.append(answer)

    def together(self, seconds: float) -> None:
        """The answers were made at the same time, and all of them took so long."""
        self._seconds = seconds

    def __enter__(self) -> Report:
        if (
            sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_json()
        ):  # which has no last row to go to
            self._live = _LiveLine(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.close()

    def line(self) -> str:
        """The live line: tok/s, share of time stalled, link GB/s."""
        seconds = max(1e-9, time.perf_counter() - self._start)
        stalled = (self._client.stats.stall_s - self._stall_s) / seconds
        status = self._client.ask_status(timeout_s=0.2)
        link = float(status.get("link_bytes_per_s", 0)) / 1e9
        return (
            f"{self._tokens} tokens, {self._tokens / seconds:.2f} tok/s,"
            f" stalled {100 * min(1.0, stalled):.0f} %, link {link:.2f} GB/s"
        )

    def summary(self) -> dict[str, Any]:
        """The figures of the run, in the units that their names say."""
        after = self._client.ask_status()
        seconds = self._seconds or sum(answer.seconds for answer in self._answers)
        tokens = sum(len(answer.ids) for answer in self._answers)
        gaps = [
            1000 * (later - earlier)
            for answer in self._answers
            for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False)
        ]
        ttft = [answer.ttft_s for answer in self._answers]
        streamed = self._client.streamed_bytes - self._streamed_before
        stall_s = self._client.stats.stall_s - self._stall_s
        engine_bytes = int(self._client.peak_bytes())
        feeder_bytes = int(after.get("peak_bytes", 0))
        return {
            "prompts": len(self._answers),
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tok_per_s": round(tokens / seconds, 3) if seconds else 0.0,
            "ttft_s": round(statistics.median(ttft), 4) if ttft else 0.0,
            "ms_per_token_median": round(statistics.median(gaps), 3) if gaps else 0.0,
            "streamed_bytes": streamed,
            "link_gb_per_s": round(streamed / seconds / 1e9, 3) if seconds else 0.0,
            "stall_share": round(min(1.0, stall_s / seconds), 4) if seconds else 0.0,
            "engine_peak_bytes": engine_bytes,
            "feeder_peak_bytes": feeder_bytes,
            "peak_bytes": engine_bytes + feeder_bytes,
            "strategy": after.get("strategy", ""),
            "cache": after.get("cache", ""),
            "device": after.get("device", ""),
            "dtype": after.get("dtype", ""),
        }


def print_summary(summary: dict[str, Any], as_json: bool) -> None:
    """On stderr: one line for people, or one JSON object."""
    if is_json():
        log.info("summary", extra=fields(**summary))
        return
    if as_json:
        print(json.dumps(summary), file=sys.stderr, flush=True)
        return
    candidates = candidates_said(summary)
    print(
        f"engine: {summary['tokens']} tokens in {summary['seconds']:.2f} s:"
        f" {summary['tok_per_s']:.2f} tok/s, TTFT {summary['ttft_s']:.3f} s;"
        f" streamed {format_bytes(summary['streamed_bytes'])}"
        f" at {summary['link_gb_per_s']:.2f} GB/s, stalled {100 * summary['stall_share']:.0f} %;"
        f" peak device memory {format_bytes(summary['peak_bytes'])}"
        f" (engine {format_bytes(summary['engine_peak_bytes'])},"
        f" feeder {format_bytes(summary['feeder_peak_bytes'])})"
        f"{'; ' if candidates else ''}{candidates}",
        file=sys.stderr,
        flush=True,
    )


def candidates_said(figures: dict[str, Any]) -> str:
    """What candidates brought, by the figures of a Speculation. Nothing if none were wanted."""
    asked = figures["speculate"].partition(":")[0]
    if asked == "off":
        return ""
    if not figures["candidates"]:
        if figures["speculation_off"]:
            return f"{'lookup' if asked == 'auto' else asked} is off: {figures['speculation_off']}"
        return "" if asked == "auto" else f"{asked}: no candidates were checked"
    drafted = figures["drafted_passes"]
    looked_up = figures["wide_passes"] - drafted
    sources = " and ".join(["draft"] * bool(drafted) + ["lookup"] * bool(looked_up))
    who = "and the draft" if asked == "draft" and looked_up else "which"
    rests = f", {who} does not pay here and rests" if figures["speculation_resting"] else ""
    drafting = f" {figures['drafting_s']:.2f} s drafting," if drafted else ""
    saved = figures["saved_s"]
    return (
        f"{sources}{rests}: {figures['tokens_per_pass']:.2f} tokens a pass,"
        f" {100 * figures['acceptance']:.0f} % of {figures['candidates']} candidates accepted,"
        f"{drafting} about {abs(saved):.2f} s {'saved' if saved >= 0 else 'lost'}"
    )


class _LiveLine:
    """Keeps the figures on the terminal's last row while text scrolls above it."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._end = threading.Event()
        self._rows = shutil.get_terminal_size().lines
        # Make room, bound scrolling to the rows above, and go back to where the text was.
        self._write(f"\n\x1b[1A\x1b7\x1b[1;{self._rows - 1}r\x1b8")
        self._thread = threading.Thread(target=self._run, name="live-line", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._write(f"\x1b7\x1b[r\x1b[{self._rows};1H\x1b[2K\x1b8")

    def _run(self) -> None:
        try:
            while not self._end.wait(_INTERVAL_S):
                width = shutil.get_terminal_size().columns
                text = self._report.line()[: width - 1]
                self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K{text}\x1b8")
        except (WeightFeederError, OSError):
            pass  # the main thread meets the same, and says so; or the terminal is gone

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
