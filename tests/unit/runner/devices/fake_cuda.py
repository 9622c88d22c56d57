"""A CudaRuntime on the host's memory: work runs at once, and what was called in which order is kept.

It shows that the device's code runs and calls the right stream; whether the order of streams suffices is what the
strict stand-in accelerator shows, and only a GPU shows what CUDA makes of it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runner.devices.cuda_runtime import CudaEvent


class FakeEvent:
    def __init__(self, number: int, calls: list[str]) -> None:
        self.number = number
        self._calls = calls

    def synchronize(self) -> None:
        self._calls.append(f"event {self.number} synchronized")

    def query(self) -> bool:
        return True


class _CopyWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each copy that torch makes in the thread, with the stream that is current."""

    def __init__(self, stream: "FakeStream") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        if func is torch.ops.aten.copy_.default:
            self._stream.calls.append(f"{self._stream.name} copies {args[0].numel()}")
        return func(*args, **(kwargs or {}))


class FakeStream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def record(self, event: CudaEvent) -> None:
        assert isinstance(event, FakeEvent)
        self.calls.append(f"{self.name} records {event.number}")

    def wait(self, event: CudaEvent) -> None:
        assert isinstance(event, FakeEvent)
        self.calls.append(f"{self.name} waits for {event.number}")

    def synchronize(self) -> None:
        self.calls.append(f"{self.name} synchronized")

    @contextmanager
    def current(self) -> Iterator[None]:
        with _CopyWatch(self):
            yield


@dataclass
class FakeRuntime:
    """Streams are called urgent and plain."""

    calls: list[str] = field(default_factory=list)
    device_nbytes: int = 1 << 40
    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _n_events: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def new_stream(self, *, is_urgent: bool) -> FakeStream:
        return FakeStream("urgent" if is_urgent else "plain", self.calls)

    def new_event(self) -> FakeEvent:
        with self._lock:
            self._n_events += 1
            return FakeEvent(self._n_events, self.calls)

    def device_bytes(self, nbytes: int) -> Tensor:
        if nbytes > self.device_nbytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes.\nAnd more lines.")
        self.device_nbytes -= nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor)

    def give_back(self) -> None:
        self.calls.append("gave back")
