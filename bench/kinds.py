"""What speculation brings, by what is asked for: ``python -m bench.kinds --model TARGET --draft DRAFT``.

Each kind's prompts are answered by ``launch.py`` with speculation off, with lookup and with the draft,
in turns, and the texts compared. Sums are always asked of the demo pair; the other kinds need a pair
that can do them, such as `bench.prose` makes. docs/speculation.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.exercises import Exercise, copying, listing
from bench.record import ROOT, add_output, finish
from common.arguments import Parser
from common.config import format_bytes
from common.entry import run_process
from common.errors import UsageError, WeightFeederError
from common.process import raise_on_termination
from common.store import Store
from demo import sums
from feeder.quantize import quantize_checkpoint

DEMO = ROOT / "demo" / "model", ROOT / "demo" / "draft"
FREE_WORDS = 40  # of prose, which is then to be continued
GREEDY = ("--greedy",)


class Pair(NamedTuple):
    """Two stores."""

    model: Path
    draft: Path


class Kind(NamedTuple):
    """What is asked for, and how the answer is chosen."""

    draw: Callable[[random.Random, list[str]], Exercise]
    flags: tuple[str, ...] = GREEDY


def _sum(rng: random.Random, words: list[str]) -> Exercise:
    item = sums.draw(rng, held_out=True)
    return Exercise(item.prompt, item.working)


def _free(rng: random.Random, words: list[str]) -> Exercise:
    start = rng.randrange(len(words) - FREE_WORDS)
    return Exercise(" ".join(words[start : start + FREE_WORDS]), "")


ARITHMETIC = "arithmetic"
KINDS = {
    ARITHMETIC: Kind(_sum),
    "copying": Kind(copying),
    "listing": Kind(listing),
    "free": Kind(_free),
    "sampled": Kind(
        _free, ("--temperature=1", "--seed=1")
    ),  # greedy, a small model goes in circles
}
MODES = ("off", "lookup", "draft")


class Bench:
    """Answers prompts; ``scratch`` is a directory for its files."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self._arguments, self._scratch = arguments, scratch
        self._stores: dict[Path, Path] = {}

    def kind(self, name: str, pair: Pair, words: list[str]) -> dict[str, Any]:
        """The figures of one kind, by mode."""
        kind, rng = KINDS[name], random.Random(self._arguments.seed)
        asked = [kind.draw(rng, words) for _ in range(self._arguments.prompts)]
        lines = [
            json.dumps({"input": prompt, "expected_output": answer.strip() or None})
            for prompt, answer in asked
        ]
        self._questions.write_text("\n".join(lines), encoding="utf-8")
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for _ in range(self._arguments.rounds):
            for mode in MODES:  # in turns, so that what else the machine does falls on all
                runs[mode].append(self._run(pair, mode, kind.flags))
        found = {mode: figures(runs[mode], runs["off"]) for mode in MODES}
        for mode in MODES:
            print(f"{name:10} {mode:6} {line(found[mode])}", file=sys.stderr, flush=True)
        return {"as_expected": _as_expected(runs["off"][0]["answers"]), **found}

    def store(self, path: Path) -> Path:
        """``path`` if it is a store, else one that is made of it."""
        if (path / "store.json").is_file():
            return path
        if path not in self._stores:
            made = self._scratch / f"store-{len(self._stores)}"
            quantize_checkpoint(path, made, "cpu", progress=False)
            self._stores[path] = made
        return self._stores[path]

    @property
    def _questions(self) -> Path:
        return self._scratch / "questions.jsonl"

    def _run(self, pair: Pair, mode: str, flags: tuple[str, ...]) -> dict[str, Any]:
        """The summary of a run, and its answers."""
        asked, output = self._arguments, self._scratch / "answers.jsonl"
        command = [
            sys.executable, str(ROOT / "launch.py"), f"--model={pair.model}", f"--cache={asked.cache}",
            f"--speculate={pair.draft if mode == 'draft' else mode}", f"--device={asked.device}",
            f"--prompts={self._questions}", f"--output={output}", f"--max-new-tokens={asked.tokens}",
            "--batch=1", "--wait-full", "--json", f"--name=kinds-{os.getpid()}", *flags,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stderr.strip().splitlines()
        summary = next((text for text in reversed(said) if text.startswith("{")), None)
        if done.returncode or summary is None:
            raise WeightFeederError(f"a run ended with {done.returncode}: {' '.join(said[-1:])}")
        answers = [json.loads(text) for text in output.read_text(encoding="utf-8").splitlines()]
        output.unlink()  # the next run would refuse to write over it
        return {**json.loads(summary), "answers": answers}


def figures(runs: list[dict[str, Any]], off: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of a mode, against those without speculation of the same turns."""
    after_first = sum(run["tokens"] - run["prompts"] for run in runs)
    passes = sum(run.get("passes", run["tokens"] - run["prompts"]) for run in runs)
    candidates = sum(run.get("candidates", 0) for run in runs)
    drafted = sum(run.get("drafted_passes", 0) for run in runs)
    accepted = sum(run.get("accepted", 0) for run in runs)
    pairs = list(zip(runs, off, strict=True))
    return {
        "tokens": runs[0]["tokens"],
        "tokens_per_pass": round(after_first / max(1, passes), 3),
        "candidates": candidates,
        "acceptance": round(accepted / candidates, 4) if candidates else None,
        "drafted_share": round(drafted / max(1, passes), 4),
        "tok_per_s": [run["tok_per_s"] for run in runs],
        "ratio": round(median(run["tok_per_s"] / other["tok_per_s"] for run, other in pairs), 3),
        "same_text": all(_texts(run) == _texts(other) for run, other in pairs),
    }


def line(found: dict[str, Any]) -> str:
    """The same for people."""
    right = "-" if found["acceptance"] is None else f"{100 * found['acceptance']:.0f} %"
    text = "the same text" if found["same_text"] else "ANOTHER TEXT"
    return (
        f"{found['tokens_per_pass']:5.2f} tokens a pass, {right:>5} right,"
        f" {median(found['tok_per_s']):7.2f} tok/s, {found['ratio']:.2f} of off, {text}"
    )


def _texts(run: dict[str, Any]) -> list[str]:
    return [answer["output"] for answer in run["answers"]]


def _as_expected(answers: list[dict[str, Any]]) -> float | None:
    """The share of answers that hold what was expected; None if nothing was."""
    known = [answer["found"] for answer in answers if answer["found"] is not None]
    return round(sum(known) / len(known), 4) if known else None


def run(arguments: argparse.Namespace) -> None:
    """Every kind that was asked for. UsageError for what cannot be."""
    raise_on_termination()
    for name in ("prompts", "tokens", "rounds"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    if (arguments.model is None) != (arguments.draft is None):
        raise UsageError("--model and --draft: give both, or none for the demo's sums alone")
    names = arguments.kinds.split(",") if arguments.kinds else list(KINDS)
    if arguments.model is None and not arguments.kinds:
        names = [ARITHMETIC]
    for name in names:
        if name not in KINDS:
            raise UsageError(f"kind {name!r} is not known: name some of {', '.join(KINDS)}")
        if name != ARITHMETIC and arguments.model is None:
            raise UsageError(f"kind {name}: give --model and --draft, as bench.prose makes them")
    words = _words(arguments) if set(names) != {ARITHMETIC} else []
    with tempfile.TemporaryDirectory(prefix="weight-feeder-kinds-") as scratch:
        bench, kinds = Bench(arguments, Path(scratch)), {}
        for name in names:
            of = DEMO if name == ARITHMETIC else (arguments.model, arguments.draft)
            pair = Pair(*(bench.store(path) for path in of))
            kinds[name] = {**_about(of, pair), **bench.kind(name, pair, words)}
    about = {key: getattr(arguments, key) for key in ("cache", "prompts", "tokens", "rounds")}
    print(json.dumps(finish({**about, "kinds": kinds}, arguments.output)))


def _words(arguments: argparse.Namespace) -> list[str]:
    from bench.prose import HELD_OUT_FILE  # with all that it trains with

    path = arguments.text or arguments.model / HELD_OUT_FILE
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"text {path} cannot be read ({error}): give --text FILE") from error
    if len(words) < 10 * FREE_WORDS:
        raise UsageError(f"text {path} has {len(words)} words: expected {10 * FREE_WORDS} or more")
    return words


def _about(of: tuple[Path, Path], pair: Pair) -> dict[str, str]:
    """Names and sizes of the two models."""
    found = {}
    for which, path, made in zip(("model", "draft"), of, pair, strict=True):
        store = Store.open(made)
        size = format_bytes(store.packed_bytes)
        found[which] = f"{path.resolve().name}: {len(store.weights)} weights, {size} packed"
        store.close()
    return found


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench.kinds", description="Speculation, by kind of text.")
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="a checkpoint or store; default: the demo's")
    add("--draft", type=Path, metavar="DIR", help="its draft model, a checkpoint or store")
    add("--kinds", metavar="A,B", help=f"default: all that the pair can do of {','.join(KINDS)}")
    add("--text", type=Path, metavar="FILE", help="prose; default: held-out.txt in --model")
    add("--cache", default="9", metavar="N|SIZE")
    add("--device", default="auto", help="auto, cuda, cuda:INDEX or cpu")
    add("--prompts", type=int, default=8, metavar="N", help="of each kind")
    add("--tokens", type=int, default=128, metavar="N", help="of an answer, at most")
    add("--rounds", type=int, default=3, metavar="N", help="turns, of which the median counts")
    add("--seed", type=int, default=0, metavar="N", help="draws the prompts")
    add_output(parser)
    arguments = parser.parse_args(argv)

    return run_process("bench", False, lambda _: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
