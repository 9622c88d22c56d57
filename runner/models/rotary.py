"""By which angles heads are turned at every position (Su et al., 2021). Knows no model."""

import torch
from torch import Tensor


class RotaryAngles:
    """Cosine and sine of every position's rotary angles, as far as a sequence has come."""

    # Positions are computed so many at a time, always the same together: how many are asked for changes no bit.
    _BLOCK = 256

    def __init__(self, head_dim: int, theta: float) -> None:
        # [D / 2]: theta^(-2i / D)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._frequencies = 1.0 / theta**exponents
        self._cosines = self._sines = torch.empty(0, head_dim // 2)

    def of(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of positions start..end-1, both [end - start, D / 2]."""
        known = self._cosines.shape[0]
        if end > known:
            # Twice as many each time: a prompt's tokens are not copied again for each block.
            firsts = range(known, max(end, 2 * known), self._BLOCK)
            angles = [
                torch.arange(first, first + self._BLOCK, dtype=torch.float32).unsqueeze(1) * self._frequencies
                for first in firsts
            ]
            self._cosines = torch.cat([self._cosines, *(block.cos() for block in angles)])
            self._sines = torch.cat([self._sines, *(block.sin() for block in angles)])
        return self._cosines[start:end], self._sines[start:end]
