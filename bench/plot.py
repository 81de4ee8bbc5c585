"""tok/s against device memory, one line a strategy, and what the link allows at best.

Reads results, measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.record import Results
from common.config import Cache
from common.errors import ConfigError, UsageError

GB = 1e9
_POINTS = 200


def link_limit(link: float, packed: int, slot_share: float, slots_bytes: float) -> float:
    """tok/s if all that is not in slots crosses the link, and nothing else takes time.

    ``link``: bytes a second; ``packed``: bytes of all weights, packed; ``slot_share``: packed bytes
    that a byte of slots saves (1 for packed slots, about a quarter for bf16 ones).
    """
    streamed = packed - slots_bytes * slot_share
    return link / streamed if streamed > 0 else float("inf")


def plot(results: Results, path: Path) -> None:
    """Draw the sweep and the baselines to ``path``. UsageError if there is no sweep, ConfigError
    without matplotlib. The same results give the same file."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "the plot needs the package matplotlib: pip install -e '.[bench]'"
        ) from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    sweep = _least_contexts(results.of("sweep"))
    if not sweep:
        raise UsageError("there is no sweep to plot: run python -m bench sweep first")
    run = results.run_of(sweep[-1])
    style: Any = {"svg.hashsalt": "weight-feeder", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
        _lines(axes, sweep)
        _limits(axes, results, sweep)
        _baselines(axes, results, run["device"])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=0)
        axes.set_xlabel("peak device memory of both processes, without contexts, GB")
        axes.set_ylabel("tok/s")
        axes.set_title(f"{run['device']}, {run['model']}, {run['commit']}", fontsize=9)
        axes.grid(True, which="both", alpha=0.25, linewidth=0.5)
        axes.legend(fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _least_contexts(sweep: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of settings that differ in the context alone, the one with the least."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in sorted(sweep, key=lambda one: int(one["setting"]["context"]), reverse=True):
        found[tuple(one["setting"][name] for name in ("strategy", "cache", "slots"))] = one
    return list(found.values())


def _lines(axes: Any, sweep: list[dict[str, Any]]) -> None:
    """A cache of so many bytes may hold packed copies, one of so many weights does not: two lines."""
    groups: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for found in sweep:
        setting = found["setting"]
        label = f"{setting['strategy']}, {setting['slots']} slots"
        point = (found["peak_bytes"] / GB, found["tok_per_s"])
        by_size = Cache.parse(setting["cache"]).size_bytes is not None
        groups.setdefault((label, by_size), []).append(point)
    colors = {label: f"C{i}" for i, label in enumerate(sorted({label for label, _ in groups}))}
    for (label, by_size), points in sorted(groups.items()):
        style = {"marker": "s", "ls": ":"} if by_size else {"marker": "o", "ls": "-"}
        name = f"{label}, cache by size" if by_size else label
        line = zip(*sorted(points), strict=True)
        axes.plot(*line, ms=3, lw=1, color=colors[label], label=name, **style)


def _limits(axes: Any, results: Results, sweep: list[dict[str, Any]]) -> None:
    """Dashed, as far up as the measured points go and a little further."""
    links = [
        max(results.run_of(found)["link_bytes_per_s"].values())
        for found in sweep
        if "link_bytes_per_s" in results.run_of(found)
    ]
    if not links:
        return  # there is no link, or it was not measured
    run = results.run_of(sweep[-1])
    fixed = min(found["peak_bytes"] - found["slots_bytes"] for found in sweep)
    top = 1.5 * max(found["tok_per_s"] for found in sweep)
    shares = {"dequantized": run["packed_bytes"] / run["dequantized_bytes"], "packed": 1.0}
    for (kind, share), color in zip(shares.items(), ("0.4", "0.65"), strict=True):
        ends = run["packed_bytes"] / share  # all in slots
        slots = [ends * step / _POINTS for step in range(_POINTS)]
        limits = [(s, link_limit(max(links), run["packed_bytes"], share, s)) for s in slots]
        drawn = [((fixed + s) / GB, limit) for s, limit in limits if limit <= top]
        label = f"the link's limit, {kind} slots ({max(links) / GB:.1f} GB/s)"
        axes.plot(*zip(*drawn, strict=True), ls="--", lw=1, color=color, label=label)


def _baselines(axes: Any, results: Results, device: str) -> None:
    for marker, found in zip("x+1234", results.of("baselines"), strict=False):
        if results.run_of(found)["device"] != device:
            continue
        scaled = found.get("scaled")
        label = found["setting"]["baseline"] + (f" ({scaled['label']})" if scaled else "")
        tok_per_s = scaled["tok_per_s"] if scaled else found["tok_per_s"]
        axes.plot(
            [found["peak_bytes"] / GB],
            [tok_per_s],
            marker=marker,
            color="k",
            ls="none",
            label=label,
        )
