"""``python -m engine serve``: the server in a thread of its own, the model in the main thread.

The main thread computes, as it does for prompts from the command line: signals are raised in it, and
torch, CUDA and the weight client know no other. The server's event loop runs in a second thread and
never waits for the first: what they say to each other goes through engine/serve/jobs.py.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from common.arguments import API_KEY_VARIABLE, batch_asked
from common.errors import InternalError, UsageError
from common.log import log
from common.process import Leash, raise_on_termination
from engine.serve.address import bind, is_loopback

if TYPE_CHECKING:
    import uvicorn

    from engine.serve.jobs import Scheduler
    from engine.start import Ready

GRACE_S = 5  # for replies that are under way when the server ends


def run(arguments: argparse.Namespace, leash: Leash) -> None:
    """Serve until a signal comes. Raises WeightFeederError."""
    raise_on_termination()
    _require_packages()
    key, batch = _key(arguments), batch_asked(arguments, many=True)
    for flag, value in (("--max-tokens", arguments.max_tokens), ("--queue", arguments.queue)):
        if value < 1:
            raise UsageError(f"{flag} {value}: expected at least 1")
    if not 0 <= arguments.port <= 65535:
        raise UsageError(f"--port {arguments.port}: expected from 0 to 65535")
    with closing(bind(arguments.host, arguments.port)) as listener:
        from engine.start import import_libraries, with_model

        import_libraries()
        from engine.generate import Sampling

        def work(ready: Ready) -> None:
            _serve(arguments, key, listener, ready)

        with_model(arguments, leash, Sampling(), work, batch)


def _serve(
    arguments: argparse.Namespace, key: str | None, listener: socket.socket, ready: Ready
) -> None:
    import uvicorn

    from engine.serve.app import App, Model
    from engine.serve.jobs import OneByOne
    from engine.serve.metrics import Meters
    from engine.serve.page import Page
    from engine.serve.together import Together
    from engine.text import codec_for

    context = ready.generator.context
    model = Model(
        name=arguments.model_name or ready.store.path.resolve().name,
        codec=codec_for(ready.store),
        context=context,
        vocabulary=int(ready.store.config["vocab_size"]),
        max_tokens=min(arguments.max_tokens, context),
    )
    meters = Meters(ready.client)
    scheduler: Scheduler = OneByOne(ready.generator, arguments.queue, meters)
    if ready.batch is not None:
        scheduler = Together(ready.generator, ready.batch, arguments.queue, meters)
    meters.watch(scheduler)
    names = [entry.name for entry in ready.store.weights]
    page = Page(model.name, names, arguments.name, scheduler, meters, ready.client)
    config = uvicorn.Config(
        App(model, scheduler, meters, ready.client, page).asgi(key),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    with _running(uvicorn.Server(config), listener, scheduler):
        host, port = listener.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        log.info("serving model %s on http://%s/v1, meters on http://%s/", model.name, place, place)
        scheduler.run()
    raise InternalError("the server's thread has ended")


@contextmanager
def _running(
    server: uvicorn.Server, listener: socket.socket, scheduler: Scheduler
) -> Iterator[None]:
    """The server in its thread, until the block is left. If the thread ends first, so does ``run``."""

    def serve() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            scheduler.stop()

    thread = threading.Thread(target=serve, name="server", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield
    finally:
        scheduler.stop()
        server.should_exit = True
        thread.join(2 * GRACE_S)


def _key(arguments: argparse.Namespace) -> str | None:
    """The API key, None without one. UsageError if there has to be one."""
    key = arguments.api_key
    if key is None:
        key = os.environ.get(API_KEY_VARIABLE) or None
    if key is not None and (not key.isascii() or not key.isprintable() or key.split() != [key]):
        raise UsageError("the API key is not usable: give printable ASCII without spaces")
    if key is None and not is_loopback(arguments.host):
        raise UsageError(
            f"--host {arguments.host} can be reached from other machines: give --api-key KEY too,"
            f" or set ${API_KEY_VARIABLE}"
        )
    return key


def _require_packages() -> None:
    try:
        import prometheus_client  # noqa: F401
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"serve needs the package {error.name}, which is not installed:"
            " run python -m pip install -e '.[server]'"
        ) from error
