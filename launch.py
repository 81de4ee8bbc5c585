"""One command: start the feeder and the engine, watch over both, give back everything.

Knows neither models nor devices and imports no torch: a launcher with a CUDA context would take
device memory from the slots. It starts exactly ``python -m feeder …`` and ``python -m engine …``.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

try:
    from common.arguments import (
        Parser,
        add_chat,
        add_common,
        add_engine,
        add_feeder,
        add_server,
        as_flags,
    )
    from common.checkpoint_fingerprint import checkpoint_fingerprint
    from common.checkpoint_kind import is_checkpoint
    from common.config import Cache, Speculate, parse_size
    from common.errors import EXIT_OK, UsageError, WeightFeederError
    from common.process import clear_run_directory, run_path
    from common.store import Store
    from common.supervise import Child, Supervisor
    from common.trace_file import TraceFile
    from common.vocabulary import shared_vocabulary
except ModuleNotFoundError as missing:
    print(
        f"error: the package {missing.name} is not installed for {sys.executable}:"
        " run python -m pip install -e . in this directory",
        file=sys.stderr,
    )
    sys.exit(1)

ROOT = Path(__file__).resolve().parent
DEMO_MODEL = ROOT / "demo" / "model"
DEMO_PROMPT = "1.1+2.3=?"

_EPILOG = """\
examples:
  python launch.py --cache 128
  python launch.py --model ~/models/Qwen2.5-7B-Instruct --cache 10GiB --prompt 'Hello'
  python launch.py --model STORE --cache -1 --prompts in.jsonl --output out.jsonl
  python launch.py --model STORE --speculate SMALL_MODEL
  python launch.py --model STORE --plan
  python launch.py serve --model STORE --port 8000
  python launch.py chat --model STORE
  python launch.py doctor
"""
#: What the engine does, by the first word; without one it answers prompts.
_COMMANDS = {"": add_engine, "serve": add_server, "chat": add_chat}


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; the exit code."""
    if argv[:1] == ["doctor"]:
        os.execv(sys.executable, [sys.executable, "-m", "feeder.doctor", *argv[1:]])
    arguments, feeder_actions, engine_actions = _parse(argv)
    try:
        Cache.parse(arguments.cache)  # mistakes should not wait for the quantizer
        if arguments.vram is not None:
            parse_size(arguments.vram)
        _speculation(arguments)
        with _trace(arguments.trace), _run_directory(arguments.name), Supervisor() as supervisor:
            return _run(arguments, feeder_actions, engine_actions, supervisor)
    except WeightFeederError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _parse(
    argv: list[str],
) -> tuple[argparse.Namespace, list[argparse.Action], list[argparse.Action]]:
    command = argv[0] if argv and argv[0] in _COMMANDS else ""
    parser = Parser(
        prog=f"python launch.py {command}".rstrip(),
        description="Runs a Qwen2 model whose weights need not fit the GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a checkpoint (a directory, or a GGUF file) or a store; default: the demo model",
    )
    parser.add_argument(
        "--store", metavar="DIR", help="where a checkpoint's store goes; default: the user's cache"
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--feeder-only", action="store_true", help="start no engine, print its command"
    )
    one.add_argument(
        "--engine-only", action="store_true", help="start no feeder, print its command"
    )
    one.add_argument(
        "--plan", action="store_true", help="say what to expect (--json: as JSON), and run nothing"
    )
    parser.add_argument(
        "--debug", action="store_true", help="the engine under pdb, with this terminal as its input"
    )
    engine = _COMMANDS[command](parser.add_argument_group("engine"))
    feeder = add_feeder(parser.add_argument_group("feeder"))
    both = add_common(parser)
    arguments = parser.parse_args(argv[1:] if command else argv)
    arguments.command = command
    if command == "serve" and arguments.model_name is None:
        arguments.model_name = _model_name(arguments.model)
    if not command and arguments.prompt is None and arguments.prompts is None:
        arguments.prompt = DEMO_PROMPT
    return arguments, [*feeder, *both], [*engine, *both]


def _model_name(model: str | None) -> str:
    return Path(model).expanduser().resolve().name if model else "demo"


def _run(
    arguments: argparse.Namespace,
    feeder_actions: list[argparse.Action],
    engine_actions: list[argparse.Action],
    supervisor: Supervisor,
) -> int:
    debugger = ["-m", "pdb"] if arguments.debug else []
    command = [arguments.command] if arguments.command else []
    flags = as_flags(arguments, engine_actions)
    engine = [sys.executable, *debugger, "-m", "engine", *command, *flags]
    on_terminal = arguments.debug or arguments.command == "chat"
    supervisor.leave_interrupts = on_terminal
    feeder = [sys.executable, "-m", "feeder", *as_flags(arguments, feeder_actions)]
    children: list[Child] = []
    if not arguments.feeder_only and not arguments.plan:
        # First, since importing transformers takes longest: the engine waits for its feeder.
        children.append(supervisor.start("engine", engine, foreground=on_terminal))
    wanted = {"model": _store(arguments)}
    if arguments.draft is not None:
        wanted["draft"] = _cached_store(arguments.draft, arguments.device)
    feeder += [f"--{which}={store}" for which, (store, _) in wanted.items()]
    if arguments.engine_only:
        print(f"launch: the feeder's command: {shlex.join(feeder)}", file=sys.stderr)
    else:
        for store, quantize in wanted.values():
            _quantize(store, quantize, supervisor)
        if arguments.plan:
            as_json = ["--json"] if getattr(arguments, "json", False) else []
            supervisor.run("feeder", [*feeder, "--plan", *as_json])
            return EXIT_OK
        children.append(supervisor.start("feeder", feeder))
    if arguments.feeder_only:
        print(f"launch: the engine's command: {shlex.join(engine)}", file=sys.stderr)
    supervisor.wait(until=children[0])
    return EXIT_OK


def _speculation(arguments: argparse.Namespace) -> None:
    """``--speculate`` as the engine is told it, and in ``arguments.draft`` the model that the feeder
    is to have for it. UsageError for what cannot be."""
    asked = Speculate.parse(arguments.speculate)
    arguments.draft = asked.draft
    if asked.draft is not None:
        model = _model(arguments)
        if model.is_dir():  # before anything is quantized; of a GGUF file the feeder sees
            shared_vocabulary(model, asked.draft)
    elif asked.mode == "draft" and not arguments.engine_only:
        raise UsageError("--speculate draft: give the draft model's directory in its place")
    arguments.speculate = str(asked)


def _model(arguments: argparse.Namespace) -> Path:
    model = Path(arguments.model).expanduser() if arguments.model else DEMO_MODEL
    if not is_checkpoint(model):
        raise UsageError(
            f"model {model} is no directory and no GGUF file: give a checkpoint or a store"
        )
    return model


def _store(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The store directory, and the command that makes it if it has to be made."""
    return _cached_store(_model(arguments), arguments.device, arguments.store)


def _cached_store(model: Path, device: str, place: str | None = None) -> tuple[Path, list[str]]:
    """The same of ``model``, a checkpoint or a store. ``place``: for it, else the user's cache."""
    if (model / "store.json").is_file():
        return model, []
    if place:
        store = Path(place).expanduser()
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = f"{model.resolve().name}-{checkpoint_fingerprint(model)[:16]}"
        store = cache / "weight-feeder" / name
    if (store / "store.json").is_file():
        _same_model(model, store)
        return store, []
    store.parent.mkdir(parents=True, exist_ok=True)
    quantize = [sys.executable, "-m", "feeder.quantize", f"--device={device}"]
    return store, [*quantize, str(model), str(store)]


def _quantize(store: Path, command: list[str], supervisor: Supervisor) -> None:
    """Make the store, unless there is nothing to be done."""
    if not command:
        return
    with _only_one(store, supervisor):
        if not (store / "store.json").is_file():
            supervisor.run("quantizer", command)


def _same_model(model: Path, store: Path) -> None:
    if Store.open(store).source_fingerprint != checkpoint_fingerprint(model):
        raise UsageError(
            f"store {store} was not made from checkpoint {model} as it is now:"
            " give another --store, or remove that one"
        )


@contextmanager
def _run_directory(name: str) -> Iterator[None]:
    """Nothing stays in it, also when a child is killed. UsageError if ``name`` is not usable."""
    directory = run_path(name)  # its users make it
    try:
        yield
    finally:
        clear_run_directory(directory)


@contextmanager
def _trace(path: str | None) -> Iterator[None]:
    """The trace is ours from before the children join it until after they left, however they end."""
    if path is None:
        yield
        return
    with closing(TraceFile(path)):
        yield


@contextmanager
def _only_one(store: Path, supervisor: Supervisor) -> Iterator[None]:
    """Two launchers that want the same store: one quantizes, the other waits for it."""
    path = store.parent / f".{store.name}.lock"
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # not a blocking call: it would keep Ctrl-C waiting
                supervisor.wait(until=None, timeout_s=0.2)
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
