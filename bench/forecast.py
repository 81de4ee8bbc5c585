"""What the plan would have said of a sweep, beside what was measured: ``python -m bench.forecast FILE``.

Predicts each setting of the sweep from the link and the memory bandwidth that the same file has, by the
simulation that makes the plan. Measures nothing, so that a file from elsewhere can be looked at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.record import Results
from common.entry import run_process
from common.errors import UsageError
from common.parser import Parser
from common.shapes import SHAPES
from feeder.simulate import load_shape, predict, request_for
from feeder.simulation import Hardware


def compare(results: Results) -> list[dict[str, Any]]:
    """For each setting of the sweep: ``measured_ms`` and ``predicted_ms`` a token, and the ``error`` as a
    share of the former. UsageError if the file lacks a sweep, its ceilings, or a shape that is known."""
    sweep, ceilings = results.of("sweep"), results.of("ceilings")
    if not sweep or not ceilings:
        raise UsageError(
            "no sweep with its ceilings there: run python -m bench ceilings sweep first"
        )
    found = []
    for one in sweep:
        run, setting = results.run_of(one), one["setting"]
        if run["model"] not in SHAPES:
            raise UsageError(f"model {run['model']!r} is none of the shapes {', '.join(SHAPES)}")
        link = max(run.get("link_bytes_per_s", {}).values(), default=0)
        if not link:
            raise UsageError(
                f"the sweep on {run['device']} has no link: there is nothing to predict"
            )
        hardware = Hardware(link, ceilings[-1]["memory_bytes_per_s"])
        predicted = _predicted_ms(run["model"], setting, hardware)
        measured = one["ms_per_token"]["median"]  # attention over a long context is not predicted
        figures = {"measured_ms": measured, "predicted_ms": round(predicted, 2)}
        error = round(predicted / measured - 1, 4)
        found.append({"setting": setting, **figures, "error": error})
    return found


def _predicted_ms(shape: str, setting: dict[str, Any], hardware: Hardware) -> float:
    names, elements = load_shape(shape)
    request, packed = request_for(names, elements, setting["slots"], setting["cache"])
    return predict(request, elements, setting["strategy"], hardware, packed).ms


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.forecast", description="The plan beside a sweep.")
    parser.add_argument("results", metavar="RESULTS.json", help="what python -m bench has written")
    arguments = parser.parse_args(argv)

    def work(leash: object) -> None:
        path = Path(arguments.results)
        if not path.is_file():
            raise UsageError(
                f"{path} is not a file: name what python -m bench --output has written"
            )
        compared = compare(Results(path))
        for one in compared:
            setting = one["setting"]
            name = f"{setting['slots']}, {setting['strategy']}, {setting['cache']}"
            name += f", context {setting['context']}" if setting["context"] else ""
            line = f"{name:36} measured {one['measured_ms']:7.1f} ms, predicted"
            print(
                f"{line} {one['predicted_ms']:7.1f}, {100 * one['error']:+.0f} %", file=sys.stderr
            )
        print(json.dumps(compared))

    return run_process("bench", False, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
