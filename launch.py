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
        API_KEY_VARIABLE,
        add_chat,
        add_common,
        add_engine,
        add_feeder,
        add_launcher,
        add_server,
        as_flags,
        batch_asked,
        run_parser,
    )
    from common.checkpoint_fingerprint import checkpoint_fingerprint
    from common.checkpoint_kind import is_checkpoint
    from common.config import Cache, Speculate, check_sampling, parse_size, strategy_file
    from common.errors import EXIT_OK, UsageError, WeightFeederError
    from common.log import log, report_error, setup
    from common.parser import Parser
    from common.process import clear_run_directory, run_path
    from common.settings import CONFIG_VARIABLE
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

_ABOUT = {
    "": "Runs a model whose weights need not fit the GPU. Other commands, each with --help:\n"
    "serve, chat, doctor, quantize, status, swap, stop, simulate, completion",
    "serve": "Serves a model to programs that speak OpenAI's API, with a page of meters at /.",
    "chat": "A conversation with a model, on this terminal.",
}
_EXAMPLES = {
    "": """\
  python launch.py --cache 128
  python launch.py --model ~/models/Qwen2.5-7B-Instruct --cache 10GiB --prompt 'Hello'
  python launch.py --model STORE --prompts in.jsonl --output out.jsonl
  python launch.py --model STORE --speculate SMALL_MODEL
manual: docs/cli.md; values for flags from variables and a file: docs/cli.md#settings
""",
    "serve": """\
  python launch.py serve --model STORE --port 8000
  WEIGHT_FEEDER_API_KEY=… python launch.py serve --model STORE --host 0.0.0.0
""",
    "chat": """\
  python launch.py chat --model STORE
  python launch.py chat --model STORE --system 'Answer in one sentence.' --temperature 0.7
""",
}
#: What the engine does, by the first word; without one it answers prompts.
_COMMANDS = {"": add_engine, "serve": add_server, "chat": add_chat}
#: Commands that run no model, and the modules that do them.
_ELSEWHERE = {
    "doctor": ["feeder.doctor"],
    "quantize": ["feeder.quantize"],
    "completion": ["manual.completion"],
    **{name: ["feeder", name] for name in ("status", "swap", "stop", "simulate")},
}


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; the exit code."""
    _let_children_import()
    if argv and argv[0] in _ELSEWHERE:
        module = _ELSEWHERE[argv[0]]
        os.execv(sys.executable, [sys.executable, "-m", *module, *argv[1:]])
    arguments, feeder_actions, engine_actions = _parse(argv)
    setup("launch", arguments.verbose)
    try:
        Cache.parse(arguments.cache)  # mistakes should not wait for the quantizer
        check_sampling(vars(arguments))
        if arguments.vram is not None:
            parse_size(arguments.vram)
        if arguments.strategy is not None:
            strategy_file(arguments.strategy)
        many = arguments.command == "serve" or getattr(arguments, "prompts", None) is not None
        batch = batch_asked(arguments, many)
        _speculation(arguments)
        arguments.batch = batch if many else None  # the feeder plans for as many
        with _trace(arguments.trace), _run_directory(arguments.name), Supervisor() as supervisor:
            return _run(arguments, feeder_actions, engine_actions, supervisor)
    except WeightFeederError as error:
        report_error(str(error), error.exit_code)
        return error.exit_code


def script() -> None:
    """The console script ``weight-feeder``."""
    sys.exit(main(sys.argv[1:]))


def _let_children_import() -> None:
    """Whatever directory this was called in, children find the rooms where this file is, and not
    what happens to bear their names in that directory."""
    if (ROOT / "pyproject.toml").is_file():  # a checkout; a package that is installed is found
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    os.environ["PYTHONSAFEPATH"] = "1"


def make_parser(
    command: str,
) -> tuple[Parser, list[argparse.Action], list[argparse.Action], list[argparse.Action]]:
    """The parser of a command, and its flags: the feeder's, the engine's, and those of both."""
    called = "weight-feeder" if Path(sys.argv[0]).name == "weight-feeder" else "python launch.py"
    examples = _EXAMPLES[command].replace("python launch.py", called)
    parser = run_parser(command or "run", f"{called} {command}".rstrip(), _ABOUT[command], examples)
    add_launcher(parser)
    engine = _COMMANDS[command](parser)
    feeder = add_feeder(parser)
    return parser, feeder, engine, [*add_common(parser), parser.log_format]


def _parse(
    argv: list[str],
) -> tuple[argparse.Namespace, list[argparse.Action], list[argparse.Action]]:
    command = argv[0] if argv and argv[0] in _COMMANDS else ""
    parser, feeder, engine, both = make_parser(command)
    parser.check_word(argv, [*_COMMANDS, *_ELSEWHERE])
    arguments = parser.parse_args(argv[1:] if command else argv)
    if arguments.config is not None:  # the quantizer reads settings, too
        os.environ[CONFIG_VARIABLE] = arguments.config
    if getattr(arguments, "api_key", None):  # which a command line would show to everybody here
        os.environ[API_KEY_VARIABLE] = arguments.api_key
        arguments.api_key = None
    arguments.command = command
    if command == "serve" and arguments.model_name is None:
        arguments.model_name = _model_name(arguments.model)
    if not command and arguments.prompt is None and arguments.prompts is None:
        arguments.prompt = DEMO_PROMPT
    return arguments, [*feeder, *both], [*engine, *both]


def _model_name(model: str | None) -> str:
    return Path(os.path.expanduser(model)).resolve().name if model else "demo"


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
        wanted["draft"] = _cached_store(arguments.draft, arguments)
    feeder += [f"--{which}={store}" for which, (store, _) in wanted.items()]
    if arguments.engine_only:
        log.info("the feeder's command: %s", shlex.join(feeder))
    else:
        for store, quantize in wanted.values():
            _quantize(store, quantize, supervisor)
        if arguments.plan:
            as_json = ["--json"] if getattr(arguments, "json", False) else []
            supervisor.run("feeder", [*feeder, "--plan", *as_json])
            return EXIT_OK
        children.append(supervisor.start("feeder", feeder))
    if arguments.feeder_only:
        log.info("the engine's command: %s", shlex.join(engine))
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
    model = Path(os.path.expanduser(arguments.model)) if arguments.model else DEMO_MODEL
    if not is_checkpoint(model):
        raise UsageError(
            f"model {model} is no directory and no GGUF file: give a checkpoint or a store"
        )
    return model


def _store(arguments: argparse.Namespace) -> tuple[Path, list[str]]:
    """The store directory, and the command that makes it if it has to be made."""
    return _cached_store(_model(arguments), arguments, arguments.store)


def _cached_store(
    model: Path, arguments: argparse.Namespace, place: str | None = None
) -> tuple[Path, list[str]]:
    """The same of ``model``, a checkpoint or a store. ``place``: for it, else the user's cache."""
    if (model / "store.json").is_file():
        return model, []
    if place:
        store = Path(os.path.expanduser(place))
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name = f"{model.resolve().name}-{checkpoint_fingerprint(model)[:16]}"
        store = cache / "weight-feeder" / name
    if (store / "store.json").is_file():
        _same_model(model, store)
        return store, []
    store.parent.mkdir(parents=True, exist_ok=True)
    quantize = [sys.executable, "-m", "feeder.quantize", f"--device={arguments.device}"]
    logs = f"--log-format={arguments.log_format}"
    return store, [*quantize, logs, str(model), str(store)]


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
