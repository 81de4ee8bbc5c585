"""What a filler tells of its work while it is traced. ``Recorder`` itself notes nothing and costs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from common.memory import Memory
from common.trace import Tracer, now
from common.trace_device import DeviceSpans

_NOTHING = nullcontext()


class Recorder:
    """``with`` its spans round the work that a filler does, or queues on ``stream``."""

    def copy(
        self, weight: int, size_bytes: int, stream: Any = None
    ) -> AbstractContextManager[None]:
        """``size_bytes`` of the packed weight cross the link."""
        return _NOTHING

    def dequantize(
        self, weight: int, size_bytes: int, stream: Any = None
    ) -> AbstractContextManager[None]:
        """``size_bytes`` of the packed weight are dequantized."""
        return _NOTHING

    def collect(self) -> None:
        """Called by the loop now and then."""

    def close(self) -> None:
        """All the work is complete."""


SILENT = Recorder()


class TracingRecorder(Recorder):
    """On a stream: when the device did it. Without one: when the calling thread did it."""

    def __init__(self, tracer: Tracer, memory: Memory, names: Sequence[str]) -> None:
        self._tracer, self._names = tracer, names
        on_device = memory.device.type == "cuda"
        self._device = DeviceSpans(tracer, memory.device) if on_device else None

    def copy(
        self, weight: int, size_bytes: int, stream: Any = None
    ) -> AbstractContextManager[None]:
        return self._span("link", weight, size_bytes, stream)

    def dequantize(
        self, weight: int, size_bytes: int, stream: Any = None
    ) -> AbstractContextManager[None]:
        return self._span("dequantize", weight, size_bytes, stream)

    def collect(self) -> None:
        if self._device is not None:
            self._device.collect()

    def close(self) -> None:
        if self._device is not None:
            self._device.close()

    def _span(
        self, row: str, weight: int, size_bytes: int, stream: Any
    ) -> AbstractContextManager[None]:
        args = {"bytes": size_bytes}
        if self._device is not None:
            return self._device.span(stream, row, self._names[weight], args)
        return self._host_span(row, self._names[weight], args)

    @contextmanager
    def _host_span(self, row: str, name: str, args: dict[str, Any]) -> Iterator[None]:
        start = now()
        yield
        self._tracer.span(row, name, start, now(), args)
