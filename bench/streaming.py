"""Generation with everything or nearly everything streamed, against the link's own bandwidth.

python -m bench.streaming STORE [--caches 128,16] [--strategies ring] [--tokens 12] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from bench.ceilings import MB, link_bytes_per_s
from bench.record import ROOT, finish
from common.memory import CudaMemory


def generate(store: str, cache: str, strategy: str, tokens: int) -> dict[str, Any]:
    """One run of the real command; its summary, or what it said instead."""
    command = [
        sys.executable, "launch.py", "--model", store, f"--cache={cache}", f"--strategy={strategy}",
        "--prompt", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16", "--greedy", "--raw",
        f"--max-new-tokens={tokens}", "--json", "--name", "bench",
    ]  # fmt: skip
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    for line in reversed(run.stderr.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {"failed": run.stderr[-2000:]}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    link = 0.0
    if torch.cuda.is_available():
        memory = CudaMemory(torch.device("cuda", torch.cuda.current_device()))
        link = max(link_bytes_per_s(memory, mb * MB) for mb in (16, 32, 64))
    runs = []
    for strategy in arguments.strategies.split(","):
        for cache in arguments.caches.split(","):
            summary = generate(arguments.store, cache, strategy, arguments.tokens)
            if "failed" not in summary and link and summary["tokens"] > 1:
                per_pass = summary["streamed_bytes"] / summary["tokens"]
                seconds = summary["ms_per_token_median"] / 1000
                summary["decode_link_share"] = round(per_pass / seconds / link, 4)
            runs.append({"cache": cache, "strategy": strategy, **summary})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    return {"link_bytes_per_s": link, "runs": runs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--caches", default="128,16")
    parser.add_argument("--strategies", default="ring")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    print(json.dumps(finish(measure(arguments), arguments.output), indent=1))
