"""How an expert and its bytes are named between processes: keys and handles, no names, no pointers, no paths."""

from dataclasses import dataclass
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Which expert: its layer and its index in the layer."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"layers.{self.layer}.experts.{self.expert}"


class ExpertHandle(NamedTuple):
    """Where one expert's record lies in the attached segments; `generation` changes when a slot is refilled."""

    key: ExpertKey
    segment: int
    offset: int
    nbytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class DenseHandle:
    """Where one dense tensor's record lies in the attached segments."""

    name: str
    segment: int
    offset: int
    nbytes: int
