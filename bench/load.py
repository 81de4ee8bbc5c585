"""A server under load: ``python -m bench.load``. Errors, wrong answers, fairness, memory over time.

Starts a feeder and an engine that serves, as a user would in two terminals, and as many clients as are
asked for, each of which asks the next question as soon as it has an answer. Knows only what clients can
see, and the processes' memory. The demo's sums are checked against the truth; of another store the same
question has to get the same answer each time, on the CPU to the letter.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from bench.record import add_output, finish
from bench.settings import SHAPE_HELP
from bench.source import Source
from common.arguments import Parser
from common.entry import run_process
from common.errors import UsageError, WeightFeederError
from common.process import raise_on_termination
from common.store import Store
from demo.sums import Sum

PATIENCE_S = 600.0
SAMPLE_S = 1.0
QUESTIONS = 40  # different ones, of a store that is not the demo's
FLAT_SHARE, FLAT_BYTES = 1.02, 32 << 20  # by which memory may be higher at the end


class LoadFailed(WeightFeederError):
    """The server did not stand it; the figures have been printed."""


@dataclass
class Client:
    """What one client has seen."""

    answers: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)


class Load:
    """The clients of one server. ``demo``: whether it serves the demo's model."""

    def __init__(self, url: str, demo: bool, vocabulary: int, max_tokens: int) -> None:
        self._url, self._demo, self._vocabulary = url, demo, vocabulary
        self._max_tokens = max_tokens
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._known: dict[int, str] = {}
        self.errors: list[str] = []
        self.wrong = self.differing = 0
        self.clients: list[Client] = []
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        self.clients = [Client() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._work, args=(number, client), daemon=True)
            for number, client in enumerate(self.clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No further questions; waits for the answers that are under way."""
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            if thread.is_alive():
                self.errors.append("an answer that never came")

    def _work(self, number: int, client: Client) -> None:
        chance = random.Random(number)
        while not self._end.is_set():
            start = time.perf_counter()
            try:
                tokens = self._sum(chance) if self._demo else self._question(chance)
            except (OSError, ValueError, KeyError) as error:
                detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else ""
                with self._lock:
                    self.errors.append(f"client {number}: {error!r} {detail}"[:500])
                self._end.wait(1.0)
                continue
            client.answers += 1
            client.tokens += tokens
            client.seconds.append(time.perf_counter() - start)

    def _sum(self, chance: random.Random) -> int:
        task = Sum(
            str(chance.randrange(1000)), f"{chance.randrange(1000)}.{chance.randrange(1, 10)}"
        )
        messages = [{"role": "user", "content": task.prompt}]
        reply = self._ask("chat/completions", {"messages": messages, "temperature": 0})
        if reply["choices"][0]["message"]["content"] != task.working:
            self.wrong += 1
        return int(reply["usage"]["completion_tokens"])

    def _question(self, chance: random.Random) -> int:
        seed = chance.randrange(QUESTIONS)
        own = random.Random(seed)
        prompt = [own.randrange(self._vocabulary) for _ in range(own.randrange(1, 200))]
        count = own.randrange(self._max_tokens // 2, self._max_tokens + 1)
        reply = self._ask(
            "completions",
            {"prompt": prompt, "max_tokens": count, "temperature": 1, "seed": seed},
        )
        text = reply["choices"][0]["text"]
        with self._lock:
            self.differing += self._known.setdefault(seed, text) != text
        return int(reply["usage"]["completion_tokens"])

    def _ask(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"model": "load", **fields}).encode()
        request = urllib.request.Request(f"{self._url}/v1/{path}", data=body)
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            found: dict[str, Any] = json.load(reply)
            return found


class Processes:
    """A feeder and the engine that it feeds."""

    def __init__(self, store: Store, arguments: argparse.Namespace, stack: ExitStack) -> None:
        self._stack = stack
        self._name = f"load-{secrets.token_hex(4)}"
        batch = f"--batch={arguments.batch}"
        self._feeder_command = [
            "-m", "feeder", f"--name={self._name}", f"--model={store.path}", batch,
            f"--cache={arguments.cache}", f"--slots={arguments.slots}",
            f"--device={arguments.device}", *([f"--vram={arguments.vram}"] if arguments.vram else []),
        ]  # fmt: skip
        self.feeder = self._start(self._feeder_command)
        self.engine = self._start([
            "-m", "engine", "serve", f"--name={self._name}", "--port=0", "--model-name=load", batch,
            f"--queue={arguments.clients}",
        ])  # fmt: skip

    def replace_feeder(self) -> None:
        """Kill it, as a machine would that is short of memory, and start the next."""
        self.feeder.send_signal(signal.SIGKILL)
        self.feeder.wait()
        self.feeder = self._start(self._feeder_command)

    def wait_for_url(self) -> str:
        """Where the engine serves, as soon as it does."""
        assert self.engine.stderr is not None
        for line in self.engine.stderr:
            sys.stderr.write(line)
            if found := re.search(r"serving model load on (http://\S+)/v1", line):
                threading.Thread(target=self._copy_log, daemon=True).start()
                return found[1]
        raise LoadFailed("the engine has ended before it served")

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory of both, that of the shared store left out."""
        found = {}
        for name, process in (("engine", self.engine), ("feeder", self.feeder)):
            try:
                with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
                    found[name] = sum(
                        int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon")
                    )
            except OSError:  # a feeder that is being replaced
                found[name] = 0
        return found

    def _copy_log(self) -> None:
        assert self.engine.stderr is not None
        for line in self.engine.stderr:
            sys.stderr.write(line)

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        stderr = subprocess.PIPE if "engine" in command else None
        process = subprocess.Popen(
            [sys.executable, *command], stderr=stderr, stdout=subprocess.DEVNULL, text=True
        )
        self._stack.callback(_end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def run(arguments: argparse.Namespace) -> None:
    """Load, and print what came of it. LoadFailed if that is not good."""
    for name in ("clients", "seconds", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1")
    raise_on_termination()
    with ExitStack() as stack:
        source = stack.enter_context(
            Source(arguments.store, arguments.shape, torch.cuda.is_available())
        )
        store = source.store()
        processes = Processes(store, arguments, stack)
        vocabulary = int(store.config["vocab_size"])
        url = processes.wait_for_url()
        load = Load(url, source.small, vocabulary, arguments.max_tokens)
        start = time.perf_counter()
        load.start(arguments.clients)
        samples, replaced = _watch(processes, url, arguments, start)
        load.stop()
        seconds = time.perf_counter() - start
        alive = processes.engine.poll() is None and processes.feeder.poll() is None
    result = _figures(load, samples, seconds, arguments)
    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    result |= {"model": source.name, "feeders_replaced": replaced, "processes_alive": alive}
    result["good"] = bool(
        alive and not load.errors and not load.wrong and not (on_cpu and load.differing)
        and result["memory_flat"] and result["fair"]
    )  # fmt: skip
    print(json.dumps(finish(result, arguments.output)))
    if not result["good"]:
        raise LoadFailed("the load was not stood as it should be: see the figures")


def _watch(
    processes: Processes, url: str, arguments: argparse.Namespace, start: float
) -> tuple[list[dict[str, float]], int]:
    """Samples of memory until the time is up. Replaces the feeder now and then, if that is asked."""
    samples: list[dict[str, float]] = []
    replaced = 0
    while (now := time.perf_counter() - start) < arguments.seconds:
        if arguments.replace_every and now > (replaced + 1) * arguments.replace_every:
            processes.replace_feeder()
            replaced += 1
        sample: dict[str, float] = {"at_s": round(now, 2), **processes.memory_bytes()}
        with urllib.request.urlopen(f"{url}/metrics", timeout=PATIENCE_S) as reply:
            text = reply.read().decode()
        for name in ("running_requests", "queue_length", "generated_tokens_total"):
            sample[name] = _metric(text, name)
        sample["device_peak"] = _metric(text, 'device_memory_peak_bytes{process="engine"}')
        samples.append(sample)
        time.sleep(SAMPLE_S)
    return samples, replaced


def _metric(text: str, name: str) -> float:
    found = re.search(rf"^weight_feeder_{re.escape(name)} (\S+)$", text, re.M)
    return float(found[1]) if found else 0.0


def _figures(
    load: Load, samples: list[dict[str, float]], seconds: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    half = samples[len(samples) // 2 :]
    third, fourth = half[: len(half) // 2], half[len(half) // 2 :]
    memory, flat = {}, bool(third)
    for name in ("engine", "device_peak"):  # the feeder's is its arena, made once
        before = max((sample[name] for sample in third), default=0)
        after = max((sample[name] for sample in fourth), default=0)
        memory[name] = {"third_quarter": int(before), "last_quarter": int(after)}
        flat = flat and after <= max(before * FLAT_SHARE, before + FLAT_BYTES)
    answers = sorted(client.answers for client in load.clients)
    waits = sorted(one for client in load.clients for one in client.seconds)
    return {
        "clients": arguments.clients,
        "batch": arguments.batch,
        "seconds": round(seconds, 1),
        "answers": sum(answers),
        "tok_per_s": round(sum(client.tokens for client in load.clients) / seconds, 2),
        "errors": load.errors[:10],
        "error_count": len(load.errors),
        "wrong": load.wrong,
        "differing": load.differing,
        "answers_a_client": {
            "least": answers[0], "median": median(answers), "most": answers[-1],
        },
        # First come, first in: nobody gets less than half of what the others get, but for the last.
        "fair": answers[0] >= 1 and answers[0] >= median(answers) // 2,
        "answer_s": {
            "median": round(median(waits), 3) if waits else None,
            "most": round(waits[-1], 3) if waits else None,
        },
        "running_most": max((sample["running_requests"] for sample in samples), default=0),
        "memory_bytes": memory,
        "memory_flat": flat,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.load", description="A server under load.")
    add = parser.add_argument
    add("--store", metavar="STORE", help="serve this store")
    add("--shape", metavar="SHAPE", help=SHAPE_HELP)
    add("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    add("--cache", default="auto", metavar="N|SIZE|auto")
    add("--vram", metavar="SIZE")
    add("--slots", default="auto", choices=("auto", "packed", "dequantized"))
    add("--batch", type=int, default=16, metavar="N")
    add("--clients", type=int, default=64, metavar="N")
    add("--seconds", type=float, default=300.0, metavar="S")
    add("--max-tokens", type=int, default=64, metavar="N", help="of a random store's answers")
    add("--replace-every", type=float, metavar="S", help="kill and replace the feeder")
    add_output(parser)
    arguments = parser.parse_args(argv)

    return run_process("bench", False, lambda _: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
