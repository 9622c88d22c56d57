"""What is said of guessed experts: the share of the true ones among them, by depth and by how many are guessed. Pure.

A guess for the layer `depth` ahead is made with that layer's own norm and gate, on states that are not its own yet:
the residual stream behind this layer's attention, where it is known earliest, or behind its experts, one layer's
computation nearer to the truth (Eliseev and Mazur, Fast Inference of Mixture-of-Experts Language Models with
Offloading, 2023, section 3.2).
"""

from dataclasses import dataclass

from runner.traces.record import TraceShape

AFTER_ATTENTION = "after_attention"
AFTER_LAYER = "after_layer"
STATES = (AFTER_ATTENTION, AFTER_LAYER)


@dataclass(frozen=True, slots=True)
class Recall:
    """The share of the experts chosen `depth` layers ahead that were among the first 1, 2, ... guessed."""

    state: str
    depth: int
    ratios: tuple[float, ...]


def recall_by_chance(shape: TraceShape, n_guessed: int) -> float:
    """Return the recall of so many experts drawn at random."""
    return n_guessed / shape.n_experts
