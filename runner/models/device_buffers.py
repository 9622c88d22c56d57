"""A small buffer between host and device that grows to the longest that was asked for. One per purpose, one event each.

Used from the model's thread; `copy_out` by the device's work. The thread blocks in `awaited`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from runner.devices.device import Buffer, Device


class HostRows:
    """Rows of 32-bit values, one row behind the other without gaps: one copy moves them, whatever their length."""

    def __init__(self, device: Device, name: str) -> None:
        self._device = device
        self._name = name
        self._buffer: Buffer | None = None
        self._lengths: list[int] = []
        self._written = device.new_event(f"{name} written")

    @property
    def buffer(self) -> Buffer:
        """Return the memory, for what is launched; `rows` or `write` has been called before."""
        assert self._buffer is not None  # noqa: S101 - a mistake of ours, no state that can be met
        return self._buffer

    def rows(self, n_rows: int, n_cols: int) -> Tensor:
        """Return so many rows for the device to write, f32 [n_rows, n_cols]; what was there is gone."""
        return self._grown(n_rows * n_cols)[: n_rows * n_cols].view(n_rows, n_cols)

    def awaited(self, rows: Tensor) -> Tensor:
        """Block until all that was launched has run; return the host's own copy of the rows."""
        self._device.compute.record(self._written)
        self._device.synchronize(self._written)
        with self._device.host_read(self.buffer):
            return rows.clone()

    def write(self, parts: Sequence[Tensor]) -> None:
        """Put f32 tensors one behind the other; all that was launched with those before has run."""
        self._lengths = [part.numel() for part in parts]
        self._grown(sum(self._lengths))
        with self._device.host_write(self.buffer) as memory:
            flat = torch.split(memory[: sum(self._lengths)], self._lengths)
            for place, part in zip(flat, parts, strict=True):
                place.copy_(part.flatten())

    def copy_out(self, targets: Sequence[Tensor]) -> None:
        """Copy what was written into tensors on the device; called by launched work."""
        flat = torch.split(self.buffer.tensor[: sum(self._lengths)], self._lengths)
        for target, place in zip(targets, flat, strict=True):
            target.copy_(place.view_as(target), non_blocking=True)

    def _grown(self, n_values: int) -> Tensor:
        if self._buffer is None or self._buffer.tensor.numel() < n_values:
            self._buffer = self._device.new_host_buffer(self._name, torch.empty(n_values))
        return self._buffer.tensor
