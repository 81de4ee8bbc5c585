"""One real feeder process, and in this process an engine that it feeds, for a whole sweep.

Two processes for every setting would spend most of a GPU's time on starts. So strategy and cache are
changed by the swap that any user can ask for, and this process is the engine: the same client and the
same model, without the command line. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.guard import limited
from common import protocol as p
from common.errors import PeerError
from common.formats import DEQUANTIZED
from common.memory import CudaMemory, memory_for
from common.process import (
    ENGINE_LOCK,
    MODEL_LOCK,
    Lock,
    clear_run_directory,
    raise_on_termination,
    run_directory,
)
from common.store import Store
from common.supervise import Supervisor
from engine.client import WeightClient
from feeder.control import SWAP_PATIENCE_S, ask

START_LIMIT_S = 180.0
SETTLE_LIMIT_S = 10.0
_SETTLE_INTERVAL_S = 0.02


class Fed:
    """``client`` and ``model``: the engine's side. ``with`` it round what is measured.

    The feeder starts with the smallest cache there is, so that what it has ever had on the device is
    what the largest setting so far took: measure small caches first.
    """

    def __init__(
        self,
        store: Store,
        device: str,
        slots: str = DEQUANTIZED,
        context: int = 0,
        draft: Store | None = None,
    ) -> None:
        """``context``: tokens that the feeder leaves room for; 0 for its own default. ``draft``: the
        store of a draft model, which is lent too."""
        self.store = store
        self._name = f"bench-{os.getpid()}"
        self._command = [
            sys.executable, "-m", "feeder", f"--model={store.path}", f"--name={self._name}",
            f"--device={device}", f"--slots={slots}", "--cache=1",
        ]  # fmt: skip
        if draft is not None:
            self._command.append(f"--draft={draft.path}")
        if context:
            self._command.append(f"--context={context}")
        self._stack, self._feeder = ExitStack(), ExitStack()
        self._supervisor: Supervisor

    def __enter__(self) -> Fed:
        with ExitStack() as stack:
            directory = run_directory(self._name)
            stack.callback(clear_run_directory, directory)
            lock = Lock(directory / ENGINE_LOCK, "engine")
            stack.callback(lock.release)
            lock.acquire()
            stack.callback(self._stop_feeder)
            self._start_feeder()
            self._connect(directory, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def limited(self, limit_s: float) -> AbstractContextManager[None]:
        """Raises out of what it is put round if that takes longer, or if the feeder ends."""
        return limited(limit_s, self._look)

    def swap(self, strategy: str, cache: str) -> None:
        """Other slots for the feeder. PeerError if it refuses."""
        if self.step is not None:
            self.step.rest()
        ask(self._name, p.Swap(strategy, cache), SWAP_PATIENCE_S)

    def status(self) -> dict[str, Any]:
        """The feeder's figures. PeerError if it does not answer."""
        fields = self.client.ask_status()
        if not fields:
            raise PeerError("the feeder does not answer")
        return dict(fields)

    def settle(self) -> dict[str, Any]:
        """The feeder's figures once it has filled all that it wants and stands still."""
        end = time.monotonic() + SETTLE_LIMIT_S
        before, same = None, 0
        while True:
            # Asking returns every slot whose kernels are complete. The feeder may answer before it
            # acts on that, so that only the third answer is sure to come after.
            status = self.status()
            now = tuple(status[name] for name in ("fills", "grants", "slots_in_use"))
            same = same + 1 if now == before else 0
            if status["full"] and same >= 2:
                return status
            if time.monotonic() > end:
                raise PeerError(f"the feeder has not come to rest in {SETTLE_LIMIT_S:.0f} s")
            before = now
            time.sleep(_SETTLE_INTERVAL_S)

    def restart(self) -> None:
        """Another feeder, after one that ended or that hangs: the client finds it by its name."""
        self._stop_feeder()
        self._start_feeder()
        with self.limited(START_LIMIT_S):
            while self.client.wait_for_feeder().pid != self._feeder_pid:
                time.sleep(_SETTLE_INTERVAL_S)

    def forget_peak(self) -> None:
        """``engine_peak_bytes`` is counted from now on."""
        if isinstance(self.memory, CudaMemory):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.memory.device)

    def _look(self) -> None:
        """Raises ChildFailed, with the cause, if the feeder has ended."""
        self._supervisor.wait(until=None, timeout_s=0.0)

    def _stop_feeder(self) -> None:
        self._feeder.close()

    def _start_feeder(self) -> None:
        with ExitStack() as stack:
            self._supervisor = stack.enter_context(_interruptible(Supervisor()))
            self._feeder_pid = self._supervisor.start("feeder", self._command).process.pid
            import engine.model  # noqa: F401  # takes seconds, as does the feeder's loading

            with self.limited(START_LIMIT_S):
                while not self._answers():
                    time.sleep(0.05)
            self._feeder = stack.pop_all()

    def _answers(self) -> bool:
        try:
            ask(self._name, p.StatusRequest(), patience_s=0.5)
        except PeerError:
            return False
        return True

    def _connect(self, directory: Path, stack: ExitStack) -> None:
        from engine.model import build_model
        from engine.steps import steps_for

        self.client = WeightClient(directory)
        stack.callback(self._disconnect)
        with self.limited(START_LIMIT_S):
            feeder = self.client.wait_for_feeder()
            self.memory = memory_for(feeder.device)
            self.client.use(self.memory)
            if self.memory.device.type == "cpu":  # the feeder needs a core of its own
                threads = torch.get_num_threads()
                stack.callback(torch.set_num_threads, threads)
                torch.set_num_threads(max(1, threads - 1))
            self.dtype: torch.dtype = getattr(torch, feeder.dtype)
            self.model = build_model(self.store, self.client, self.memory, self.dtype)
            self.step = steps_for(self.model, self.client)
        model_lock = Lock(directory / MODEL_LOCK, "engine")
        stack.callback(model_lock.release)
        model_lock.acquire()  # the feeder then reckons with our memory as taken

    def _disconnect(self) -> None:
        step = getattr(self, "step", None)
        if step is not None:
            step.rest()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # slots go back only when no kernel reads them
        self.client.close()


@contextmanager
def _interruptible(supervisor: Supervisor) -> Iterator[Supervisor]:
    """A supervisor only notes signals, for a launcher that sleeps; this process computes."""
    with supervisor:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise_on_termination()
        yield supervisor
