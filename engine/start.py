"""Starts an engine: finds its feeder, builds the model, lets it work, returns everything.

The work is to answer prompts; ``engine/serve`` and ``engine/chat`` bring work of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

from common.arguments import batch_asked
from common.config import Speculate
from common.entry import at_last
from common.errors import PeerError, UsageError
from common.log import log
from common.memory import Memory, memory_for
from common.process import (
    ENGINE_LOCK,
    MODEL_LOCK,
    Leash,
    Lock,
    raise_on_termination,
    remove_run_directory,
    run_directory,
)
from common.quick_imports import quick_imports
from common.store import Store
from common.trace import Tracer
from engine.client import WeightClient
from engine.prompts import Prompt, read_prompts, record
from engine.traced_client import ROWS, client_for

if TYPE_CHECKING:  # transformers takes seconds to import: mistakes in the flags come first
    from transformers import PreTrainedModel

    from engine.batch.batch import Batch
    from engine.draft import Draft
    from engine.generate import Generator, Sampling
    from engine.report import Report
    from engine.speculation import Speculation
    from engine.steps import Steps

#: What transformers imports along wherever it is installed, and nothing here uses.
UNUSED = ("pandas", "peft", "scipy", "sklearn", "torchaudio", "torchvision")


@dataclass(frozen=True)
class Ready:
    """A model that can answer, and what belongs to it. To be used by the main thread."""

    generator: Generator
    client: WeightClient
    memory: Memory
    store: Store
    model: PreTrainedModel
    tracer: Tracer | None
    speculation: Speculation | None
    batch: Batch | None  # if several sequences are to share a pass


def run(arguments: argparse.Namespace, leash: Leash) -> None:
    """Answer what the flags ask. Raises WeightFeederError."""
    prompts, sampling = _prompts(arguments), sampling_of(arguments)
    raise_on_termination()
    with ExitStack() as files:
        output = sys.stdout
        if arguments.output is not None:
            output = _create("output", arguments.output, files)
        if arguments.profile is not None:
            _create("profile", arguments.profile, files).close()

        def work(ready: Ready) -> None:
            _answer_all(arguments, ready, prompts, output)

        with_model(
            arguments, leash, sampling, work, batch_asked(arguments, bool(arguments.prompts))
        )


def with_model(
    arguments: argparse.Namespace,
    leash: Leash,
    sampling: Sampling,
    work: Callable[[Ready], None],
    batch: int = 1,
) -> None:
    """Make the model ready, let it ``work``, and give everything back. ``batch``: so many sequences
    may share a pass. Raises WeightFeederError."""
    if Speculate.parse(arguments.speculate).draft is not None:
        raise UsageError(
            f"--speculate {arguments.speculate}: an engine takes the draft model of its feeder: start"
            " that with --draft STORE, and this with --speculate draft"
        )
    raise_on_termination()
    if arguments.debugpy is not None:
        _wait_for_editor(arguments.debugpy)
    directory = run_directory(arguments.name)
    with ExitStack() as stack:
        stack.callback(remove_run_directory, directory)
        lock = Lock(directory / ENGINE_LOCK, "engine")
        stack.callback(lock.release)
        lock.acquire()
        tracer = None
        if arguments.trace is not None:
            tracer = Tracer(arguments.trace, "engine", ROWS, place=2)
            stack.callback(tracer.close)
        client = client_for(tracer)(directory, leash.fd, arguments.verify)
        stack.push(at_last(client.close))
        model_lock = Lock(directory / MODEL_LOCK, "engine")
        stack.callback(model_lock.release)
        try:
            _generate(arguments, client, model_lock, sampling, work, tracer, batch)
        except torch.OutOfMemoryError as error:
            from engine.shortage import shortage

            raise shortage(str(error)) from error


def _generate(
    arguments: argparse.Namespace,
    client: WeightClient,
    model_lock: Lock,
    sampling: Sampling,
    work: Callable[[Ready], None],
    tracer: Tracer | None,
    most: int,
) -> None:
    from engine.batch.batch import Batch
    from engine.batch.passes import Passes
    from engine.generate import Generator
    from engine.loop import Loop
    from engine.model import build_model
    from engine.shortage import MemoryKeeper
    from engine.steps import steps_for
    from engine.text import codec_for

    feeder = client.wait_for_feeder()
    memory = memory_for(feeder.device)
    client.use(memory)
    if memory.device.type == "cpu":  # the feeder needs a core of its own
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    store = Store.open(Path(feeder.store))
    if store.fingerprint != feeder.fingerprint:
        raise PeerError(
            f"store {store.path} is now {store.fingerprint}, the feeder loaded {feeder.fingerprint}:"
            " restart the feeder"
        )
    client.names = [entry.name for entry in store.weights]
    dtype = getattr(torch, feeder.dtype)
    codec = codec_for(store)
    model = build_model(store, client, memory, dtype, arguments.attention)
    draft = _draft(arguments, store, client, memory, dtype)
    model_lock.acquire()  # a feeder that starts from now on knows that our memory is taken
    keeper = MemoryKeeper(model, client, memory)
    step = None if arguments.no_step else steps_for(model, client)
    speculation = None
    if most == 1:  # candidates are of one sequence
        speculation = _speculation(arguments, client, memory.device, len(store.weights), step)
    loop = Loop(step, keeper.survive, speculation, draft)
    raw = bool(getattr(arguments, "raw", False))
    generator = Generator(model, codec, sampling, raw, loop, keeper.chunk)
    batch = None
    if most > 1:
        batch = Batch(model, Passes(model, step, keeper.survive), keeper, most)
    if arguments.wait_full:
        _wait_full(client)
    with ExitStack() as stack:
        if memory.device.type == "cuda":  # slots go back only when no kernel reads them
            stack.push(at_last(lambda: torch.cuda.synchronize(memory.device)))
        work(Ready(generator, client, memory, store, model, tracer, speculation, batch))


def _answer_all(
    arguments: argparse.Namespace, ready: Ready, prompts: list[Prompt], output: TextIO
) -> None:
    from engine.profile import profiled
    from engine.report import Report, print_summary
    from engine.traced_report import TracedReport

    client, tracer = ready.client, ready.tracer
    report = Report(client) if tracer is None else TracedReport(tracer, client, ready.model)
    with ExitStack() as stack:
        stack.enter_context(report)
        device = ready.memory.device
        if ready.batch is not None:
            from engine.batch.prompts import answer_together

            tick = stack.enter_context(profiled(arguments.profile, device, lambda: None))
            answer_together(prompts, ready.generator, ready.batch, report, tick, output)
        else:
            token = stack.enter_context(profiled(arguments.profile, device, report.token))
            for prompt in prompts:
                _answer(prompt, ready.generator, report, token, output, bool(arguments.prompts))
    speculation = ready.speculation
    figures: dict[str, object] = {"speculate": "off"}
    if speculation is not None:
        figures = speculation.figures()
    if ready.batch is not None:
        figures |= {"batch": ready.batch.most, "passes": ready.batch.passes}
    print_summary(report.summary() | figures, arguments.json)


def _speculation(
    arguments: argparse.Namespace,
    client: WeightClient,
    device: torch.device,
    count: int,
    step: Steps | None,
) -> Speculation | None:
    """Nothing if none is wanted; nor, unless asked for, in a profile, which takes tokens for passes."""
    from engine.speculation import Speculation

    asked = Speculate.parse(arguments.speculate)
    if asked.mode == "off" or (
        asked.mode == "auto" and getattr(arguments, "profile", None) is not None
    ):
        return None
    weights = range(count)

    def streams() -> bool:
        return not (step is not None and step.graphed) and not client.stay(weights)

    def most() -> int:
        return step.most if step is not None else 1

    def clock() -> float:  # a pass does not cost more for being made while a feeder was replaced
        return time.perf_counter() - client.absent_s

    return Speculation(asked, streams, clock, rounds=device.type != "cpu", most=most)


def _draft(
    arguments: argparse.Namespace,
    store: Store,
    client: WeightClient,
    memory: Memory,
    dtype: torch.dtype,
) -> Draft | None:
    """The draft model that the feeder has, if it is asked for. UsageError if there is none."""
    from engine.draft import lent_draft

    feeder = client.wait_for_feeder()
    if Speculate.parse(arguments.speculate).mode != "draft":
        return None
    if not feeder.draft:
        raise UsageError(
            f"--speculate draft: feeder {arguments.name!r} has no draft model: start it with --draft"
            " STORE, or give launch.py --speculate DIR"
        )
    stepped = not arguments.no_step
    return lent_draft(client, store, memory, dtype, arguments.attention, stepped)


def _answer(
    prompt: Prompt,
    generator: Generator,
    report: Report,
    token: Callable[[], None],
    output: TextIO,
    is_list: bool,
) -> None:
    show = output is not sys.stdout or not is_list  # the JSON lines have stdout to themselves

    def write(text: str) -> None:
        if show:
            sys.stdout.write(text)
            sys.stdout.flush()

    answer = generator.answer(prompt.text, write, token)
    if show:
        write("\n")
    report.add(answer)
    if is_list:
        tokens = len(answer.ids)
        line = record(prompt, answer.text, tokens, answer.seconds, answer.ttft_s)
        output.write(line + "\n")
        output.flush()


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE")
    if arguments.output is not None and arguments.prompts is None:
        raise UsageError("--output is for the answers of --prompts: give --prompts FILE too")
    if arguments.prompt is not None:
        return [Prompt(arguments.prompt)]
    return read_prompts(Path(arguments.prompts))


def import_libraries() -> None:
    """Transformers and what generates with it, which takes seconds: when the flags have been looked at."""
    with quick_imports(UNUSED):
        import_module("engine.generate")


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """The sampling that the flags ask for. UsageError if it cannot be."""
    import_libraries()
    from engine.generate import Sampling

    names = [field.name for field in dataclasses.fields(Sampling)]
    return Sampling(**{name: getattr(arguments, name) for name in names})


def _create(what: str, path: str, stack: ExitStack) -> TextIO:
    """A new file, which goes with ``stack`` if nothing is in it by then. UsageError if it exists."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        stack.callback(_remove_if_empty, path)  # only from here on it is ours to remove
        return stack.enter_context(os.fdopen(fd, "w", encoding="utf-8"))
    except FileExistsError:
        raise UsageError(f"{what} file {path} exists: remove it, or name another") from None
    except OSError as error:
        raise UsageError(f"{what} file {path} cannot be written: {error.strerror}") from error


def _wait_for_editor(port: int) -> None:
    if not 1 <= port <= 65535:
        raise UsageError(f"--debugpy {port}: expected a port from 1 to 65535")
    try:
        import debugpy
    except ImportError as error:
        raise UsageError(
            "--debugpy needs the package debugpy, which is not installed: pip install debugpy"
        ) from error
    try:
        debugpy.listen(("127.0.0.1", port))
    except (OSError, RuntimeError, OverflowError, ValueError) as error:
        raise UsageError(f"--debugpy {port}: cannot listen there: {error}") from error
    log.info("waiting for a debugger to attach on 127.0.0.1:%d", port)
    debugpy.wait_for_client()


def _remove_if_empty(path: str) -> None:
    """A run that answered nothing leaves no file that would be in the way of the next."""
    if os.path.exists(path) and os.path.getsize(path) == 0:
        os.unlink(path)


def _wait_full(client: WeightClient) -> None:
    log.info("waiting until the cache is full")
    while not client.ask_status().get("full", False):
        time.sleep(0.05)
