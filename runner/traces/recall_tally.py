"""Guesses which experts later layers will choose, and counts how often the guess was right.

Owns the guesses that wait for their layer; runs the gates it is given, and knows nothing else of the model. Letters:
T tokens, H hidden size.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from quant.layer import choose_experts
from runner.traces.recall import STATES, Recall
from runner.traces.record import TraceShape

DEPTH_MAX = 10
_N_GUESSED_MAX = 16

# The gate logits f32 [T, n_experts] that a layer gives states f32 [T, H], which its norm has not seen yet.
Gate = Callable[[Tensor], Tensor]


class RecallTally:
    """Guesses at every layer and counts them when the truth comes; one thread, layers in order, from the first one.

    Every step is whole: a new one, which begins with layer 0, forgets the guesses of one that was not finished.
    """

    def __init__(self, shape: TraceShape, gates: Sequence[Gate], *, depth_max: int = DEPTH_MAX) -> None:
        self._gates = gates
        self._depths = range(1, min(depth_max, shape.n_layers - 1) + 1)
        self.n_guessed_max = min(shape.n_experts, _N_GUESSED_MAX)
        # By the layer they are for: state, depth, and expert ids [T, n_guessed_max], the most likely first.
        self._guesses: list[list[tuple[str, int, Tensor]]] = [[] for _ in range(shape.n_layers)]
        self._n_named = {(state, depth): [0] * self.n_guessed_max for state in STATES for depth in self._depths}
        self._n_chosen = dict.fromkeys(self._n_named, 0)

    def see(self, layer: int, expert_ids: Tensor, states: dict[str, Tensor]) -> None:
        """Count the guesses for this layer against its experts int64 [T, top_k]; guess on its states f32 [T, H]."""
        if layer == 0:
            self._guesses = [[] for _ in self._guesses]
        for state, depth, guessed in self._guesses[layer]:
            self._count((state, depth), guessed, expert_ids)
        self._guesses[layer] = []
        for depth in self._depths:
            if layer + depth < len(self._guesses):
                for state in STATES:
                    guessed, _ = choose_experts(self._gates[layer + depth](states[state]), self.n_guessed_max)
                    self._guesses[layer + depth].append((state, depth, guessed))

    def result(self) -> tuple[Recall, ...]:
        """Return the recall of both states at all depths that were seen."""
        return tuple(
            Recall(state, depth, tuple(n / self._n_chosen[state, depth] for n in n_named))
            for (state, depth), n_named in self._n_named.items()
            if self._n_chosen[state, depth]
        )

    def _count(self, key: tuple[str, int], guessed: Tensor, expert_ids: Tensor) -> None:
        is_named = (guessed.unsqueeze(2) == expert_ids.unsqueeze(1)).any(2)  # [T, n_guessed_max]
        # An expert is guessed once: summed over ranks, each chosen one counts from its rank on.
        n_named: list[int] = is_named.sum(0).cumsum(0).tolist()
        self._n_named[key] = [before + now for before, now in zip(self._n_named[key], n_named, strict=True)]
        self._n_chosen[key] += expert_ids.numel()
