"""Small tensors from the host to a GPU without waiting for what the GPU does meanwhile. Knows no streams."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on that device, copied behind the current stream's work; the host does not wait for it.

    The copy's source is page-locked memory that torch keeps until the copy has run.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
