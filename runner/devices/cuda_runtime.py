"""As much of torch.cuda as a CudaDevice needs, on one GPU: the only place where the runner calls it for streams.

Owns no memory and no order; each method is one call of torch.cuda, so that what stands above can be run where there is
no GPU. Every method may be called by several host threads at once; which stream is current is each thread's own.
"""

from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor


class CudaEvent(Protocol):
    """torch.cuda.Event, as far as it is used."""

    def synchronize(self) -> None:
        """Block the calling thread, without the interpreter's lock, until the latest record was reached."""
        ...

    def query(self) -> bool:
        """Return whether the latest record was reached."""
        ...


class CudaStream(Protocol):
    """torch.cuda.Stream, as far as it is used."""

    def record(self, event: CudaEvent) -> None:
        """Make the event stand for all that was submitted to this stream until now."""
        ...

    def wait(self, event: CudaEvent) -> None:
        """Run what is submitted from now on only after the event's latest record."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread, without the interpreter's lock, until all that was submitted has run."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Return a context in which the calling thread's work and memory are this stream's, on its GPU."""
        ...


class CudaRuntime(Protocol):
    """One GPU."""

    @property
    def torch_device(self) -> torch.device:
        """Return the GPU as torch names it."""
        ...

    def new_stream(self, *, is_urgent: bool) -> CudaStream:
        """Return a stream that waits for no other one by itself; an urgent one goes before others."""
        ...

    def new_event(self) -> CudaEvent:
        """Return an event that was never recorded."""
        ...

    def device_bytes(self, nbytes: int) -> Tensor:
        """Return memory of the GPU, uint8 [nbytes], of the stream that is current."""
        ...

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Return page-locked host memory of that tensor's shape and type, of any content."""
        ...

    def give_back(self) -> None:
        """Give to other processes what torch keeps of memory that nobody here uses."""
        ...


class _TorchStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def record(self, event: CudaEvent) -> None:
        self._stream.record_event(cast(torch.cuda.Event, event))

    def wait(self, event: CudaEvent) -> None:
        self._stream.wait_event(cast(torch.cuda.Event, event))

    def synchronize(self) -> None:
        self._stream.synchronize()

    def current(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)


class TorchRuntime:
    """The CudaRuntime of a GPU that is there."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)

    def new_stream(self, *, is_urgent: bool) -> CudaStream:
        """Return a stream that waits for no other one by itself; torch makes all of its own non-blocking."""
        # Lower numbers are more urgent, and what is beyond the GPU's range is taken for its end.
        priority = -100 if is_urgent else 0
        return _TorchStream(torch.cuda.Stream(self.torch_device, priority))  # type: ignore[no-untyped-call]

    def new_event(self) -> CudaEvent:
        """Return an event that was never recorded."""
        return torch.cuda.Event(enable_timing=False)  # type: ignore[no-untyped-call]

    def device_bytes(self, nbytes: int) -> Tensor:
        """Return memory of the GPU, uint8 [nbytes], of the stream that is current."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Return page-locked host memory of that tensor's shape and type, of any content."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def give_back(self) -> None:
        """Give to other processes what torch keeps of memory that nobody here uses."""
        torch.cuda.empty_cache()
