"""Segments of device memory that two processes share. The only user of CUDA IPC.

One interface, two backends: on CUDA a segment is one cudaMalloc'd allocation, exported by one IPC
handle (through the driver API of NVIDIA's cuda-bindings, so that the toolkit's version does not
matter); on the CPU it is POSIX shared memory. torch's caching allocator and its own sharing of
tensors are not used: see docs/architecture.md.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from common.errors import ConfigError, MemoryShortageError, PeerError
from common.shared import SharedMemory, available_host_bytes
from common.wait import Work

PAGE_BYTES = 2 << 20  # of device memory
PIN_CHUNK_BYTES = 2 << 30  # larger registrations fail on some drivers
#: Of local memory for each thread that a device can run, taken with the context whether kernels use it or
#: not: CUDA's own 1024 are 0.28 GB on an H100, of each process.
STACK_BYTES = 256


class Segment(ABC):
    """``tensor``: uint8 of ``size_bytes`` on the device, valid until ``close``."""

    kind: str
    tensor: torch.Tensor

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    @property
    @abstractmethod
    def handle(self) -> bytes:
        """What another process needs to ``Memory.open`` this segment."""

    @abstractmethod
    def close(self) -> None:
        """Free or unmap. Every view of ``tensor`` must be gone, every kernel that reads it done."""


class Memory(ABC):
    """The memory of one device, as one process sees it."""

    device: torch.device
    identity: str  # the same in every process for the same device
    allocated: int = 0  # bytes of segments that were allocated here and not closed

    @abstractmethod
    def allocate(self, size_bytes: int) -> Segment:
        """A new segment of at least that size. MemoryShortageError if the device has not that much."""

    @abstractmethod
    def open(self, kind: str, handle: bytes, size_bytes: int) -> Segment:
        """Map a segment of another process. PeerError if that cannot be done."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""

    @abstractmethod
    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Page-lock host memory, so that copies run at the link's speed; returns what undoes it."""

    @abstractmethod
    def device_view(self, host: torch.Tensor) -> torch.Tensor:
        """Contiguous host memory as a tensor of the device, which reads it across the link at every
        use. Page-locked, and kept, until the last view of it is gone."""

    @abstractmethod
    def limit(self, size_bytes: int) -> None:
        """Bound what torch allocates for this process on the device; 0 for no bound."""

    @abstractmethod
    def room_bytes(self) -> int:
        """Bytes that torch can still allocate for this process, its own unused ones included."""

    @abstractmethod
    def stream(self) -> Any:
        """The stream that this thread queues work on; None where there are no streams."""

    @abstractmethod
    def mark(self, stream: Any = None) -> Work | None:
        """The work queued so far on ``stream`` (default: the thread's current one).
        None where work is complete when its call returns."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """The most that this process has had allocated on the device, segments included."""

    @abstractmethod
    def bind_thread(self) -> None:
        """To be called by a thread before it uses this memory."""


class _CpuSegment(Segment):
    kind = "shm"

    def __init__(self, shared: SharedMemory, owner: CpuMemory | None = None) -> None:
        super().__init__(shared.size_bytes)
        self._shared, self._owner = shared, owner
        self.tensor = shared.tensor

    @property
    def handle(self) -> bytes:
        return self._shared.path.encode()

    def close(self) -> None:
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._shared.close()
        owner, self._owner = self._owner, None
        if owner is not None:
            owner.allocated -= self.size_bytes


class CpuMemory(Memory):
    """Host memory in the place of a device's, so that the same code runs without a GPU."""

    device = torch.device("cpu")
    identity = "cpu"

    def __init__(self) -> None:
        self._peak = self._limit = 0

    def allocate(self, size_bytes: int) -> Segment:
        segment = _CpuSegment(SharedMemory.create(size_bytes, "slots"), self)
        self.allocated += size_bytes
        self._peak = max(self._peak, self.allocated)
        return segment

    def open(self, kind: str, handle: bytes, size_bytes: int) -> Segment:
        if kind != _CpuSegment.kind:
            raise PeerError(f"segment of kind {kind!r}: an engine on the CPU expects 'shm'")
        try:
            return _CpuSegment(SharedMemory.open(handle.decode(), size_bytes))
        except (OSError, ValueError) as error:
            raise PeerError(f"the feeder's shared memory cannot be mapped: {error}") from error

    def free_bytes(self) -> int:
        return available_host_bytes()

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        return lambda: None

    def device_view(self, host: torch.Tensor) -> torch.Tensor:
        return host

    def limit(self, size_bytes: int) -> None:
        self._limit = size_bytes  # planned with, not enforced: torch bounds no host memory

    def room_bytes(self) -> int:
        available = available_host_bytes()
        return min(available, self._limit) if self._limit else available

    def stream(self) -> None:
        return None

    def mark(self, stream: Any = None) -> None:
        return None

    def peak_bytes(self) -> int:
        return self._peak

    def bind_thread(self) -> None:
        pass


class _Pointer:
    """Device memory that torch did not allocate, as the CUDA array interface describes it."""

    def __init__(self, address: int, size_bytes: int) -> None:
        # torch keeps this object for as long as it has a view of that memory.
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class _CudaSegment(Segment):
    kind = "cuda-ipc"

    def __init__(self, memory: CudaMemory, address: int, size_bytes: int, owned: bool) -> None:
        super().__init__(size_bytes)
        self._memory, self._address, self._owned = memory, address, owned
        self.tensor = torch.as_tensor(_Pointer(address, size_bytes), device=memory.device)

    @property
    def handle(self) -> bytes:
        driver = self._memory.driver
        return bytes(self._memory.call(driver.cuIpcGetMemHandle, self._address).reserved)

    def close(self) -> None:
        driver = self._memory.driver
        self.tensor = torch.empty(0, dtype=torch.uint8)
        address, self._address = self._address, 0
        if address and self._owned:
            self._memory.call(driver.cuMemFree, address)
            self._memory.allocated -= self.size_bytes
        elif address:
            self._memory.call(driver.cuIpcCloseMemHandle, address)


class _Marked(Work):
    """An event on a stream; goes back to the pool of idle events when it has fired."""

    def __init__(self, event: torch.cuda.Event, pool: list[torch.cuda.Event]) -> None:
        self._event: torch.cuda.Event | None = event
        self._pool = pool

    def complete(self) -> bool:
        if self._event is not None:
            if not self._event.query():
                return False
            self._pool.append(self._event)
            self._event = None  # it is somebody else's now
        return True


class CudaMemory(Memory):
    """One GPU's memory. Uses torch's primary context."""

    def __init__(self, device: torch.device) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ConfigError(
                "CUDA needs the package cuda-bindings, which is not installed:"
                " pip install cuda-bindings, or use --device cpu"
            ) from error
        self.driver: Any = driver
        self.device = device
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)  # makes the primary context, and makes it current
        # Kernels that need more get it: this is what each thread of the device has at the least.
        self.call(driver.cuCtxSetLimit, driver.CUlimit.CU_LIMIT_STACK_SIZE, STACK_BYTES)
        self._context = self.call(driver.cuCtxGetCurrent)
        self.identity = f"cuda:{torch.cuda.get_device_properties(device).uuid}"
        self._peak = self._limit = 0
        self._events: list[torch.cuda.Event] = []

    def call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
        """Calls the driver and checks its code. MemoryShortageError, or PeerError with its name."""
        error, *results = function(*arguments)
        if error != self.driver.CUresult.CUDA_SUCCESS:
            if error == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise MemoryShortageError(f"{function.__name__}: the GPU is out of memory")
            raise PeerError(f"{function.__name__} failed: {error.name}")
        return results[0] if results else None

    def allocate(self, size_bytes: int) -> Segment:
        # Whole pages: of another size an allocation is mapped in small pages by those who import it,
        # and read at 1.8 TB/s instead of 3.0 (H100; docs/decisions/0006-whole-pages.md).
        size_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        address = int(self.call(self.driver.cuMemAlloc, size_bytes))
        self.allocated += size_bytes
        self._peak = max(self._peak, self.allocated)
        return _CudaSegment(self, address, size_bytes, owned=True)

    def open(self, kind: str, handle: bytes, size_bytes: int) -> Segment:
        if kind != _CudaSegment.kind or len(handle) != 64:
            raise PeerError(f"segment of kind {kind!r}: an engine on CUDA expects 'cuda-ipc'")
        ipc = self.driver.CUipcMemHandle()
        ipc.reserved = handle
        flag = self.driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        address = int(self.call(self.driver.cuIpcOpenMemHandle, ipc, flag.value))
        return _CudaSegment(self, address, size_bytes, owned=False)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        driver, start = self.driver, memory.data_ptr()
        pinned: list[int] = []

        def unpin() -> None:
            while pinned:
                self.call(driver.cuMemHostUnregister, pinned.pop())

        try:
            for offset in range(0, memory.numel(), PIN_CHUNK_BYTES):
                size = min(PIN_CHUNK_BYTES, memory.numel() - offset)
                self.call(driver.cuMemHostRegister, start + offset, size, 0)
                pinned.append(start + offset)
        except (PeerError, MemoryShortageError) as error:
            unpin()
            raise MemoryShortageError(
                f"{memory.numel():,} bytes of host memory cannot be page-locked ({error}):"
                " raise the limit (ulimit -l unlimited, or docker run --ulimit memlock=-1)"
            ) from error
        return unpin

    def device_view(self, host: torch.Tensor) -> torch.Tensor:
        unpin, driver = self.pin(host.view(-1).view(torch.uint8)), self.driver
        address = int(self.call(driver.cuMemHostGetDevicePointer, host.data_ptr(), 0))
        pointer = _Pointer(address, host.nbytes)

        def close(_kept: torch.Tensor) -> None:
            torch.cuda.synchronize(self.device)  # kernels may be reading it
            unpin()

        weakref.finalize(pointer, close, host).atexit = False  # the end of the process frees it
        view = torch.as_tensor(pointer, device=self.device)
        return view.view(host.dtype).view(host.shape)

    def limit(self, size_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self.device).total_memory
        self._limit = size_bytes
        share = min(1.0, size_bytes / total) if size_bytes else 1.0
        torch.cuda.set_per_process_memory_fraction(share, self.device)
        if torch.cuda.memory_reserved(self.device) > share * total:
            torch.cuda.empty_cache()  # slots may take it now

    def room_bytes(self) -> int:
        room = self.free_bytes() + torch.cuda.memory_reserved(self.device)
        room = min(room, self._limit) if self._limit else room
        return room - torch.cuda.memory_allocated(self.device)

    def stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def mark(self, stream: Any = None) -> Work:
        event = self._events.pop() if self._events else torch.cuda.Event()
        event.record(stream or torch.cuda.current_stream(self.device))
        return _Marked(event, self._events)

    def peak_bytes(self) -> int:
        return self._peak + torch.cuda.max_memory_reserved(self.device)

    def bind_thread(self) -> None:
        self.call(self.driver.cuCtxSetCurrent, self._context)
        torch.cuda.set_device(self.device)


def memory_for(device: str) -> Memory:
    """The memory of ``device``: "auto", "cpu", "cuda", "cuda:1", or an identity from a peer."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return CpuMemory()
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device {device!r}: no usable GPU found (torch {torch.__version__}):"
            " check nvidia-smi, or use --device cpu"
        )
    return CudaMemory(_cuda_device(device))


def _cuda_device(device: str) -> torch.device:
    _, _, which = device.partition(":")
    count = torch.cuda.device_count()
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if device.startswith("cuda:") and which.isdigit():
        if int(which) < count:
            return torch.device("cuda", int(which))
        raise ConfigError(f"device {device!r}: this machine has {count} GPUs, numbered from 0")
    # Two processes may number the GPUs differently: between them a GPU is known by its UUID.
    for index in range(count):
        if f"cuda:{torch.cuda.get_device_properties(index).uuid}" == device:
            return torch.device("cuda", index)
    raise ConfigError(
        f"device {device!r} is not one of this process's: name auto, cpu, cuda or cuda:INDEX,"
        " and give feeder and engine the same CUDA_VISIBLE_DEVICES"
    )
