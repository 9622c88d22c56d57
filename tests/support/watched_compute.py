"""An ExpertCompute that lets something happen to the slots while it computes from them."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from runner.experts.compute import ExpertCall, ExpertCompute


class WatchedCompute:
    """Computes as another ExpertCompute does; `meanwhile` is called before it reads a slot, and behind."""

    def __init__(self, compute: ExpertCompute, meanwhile: Callable[[], None]) -> None:
        self._compute = compute
        self.meanwhile = meanwhile

    def use_slots(self, slots: Sequence[Tensor]) -> None:
        self._compute.use_slots(slots)

    def contribute(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        self.meanwhile()
        self._compute.contribute(call, slots, contributions)
        self.meanwhile()

    def finish(self, call: ExpertCall, slots: Mapping[int, int], contributions: Tensor) -> None:
        self.meanwhile()
        self._compute.finish(call, slots, contributions)
        self.meanwhile()

    def forward(self, call: ExpertCall, slots: Mapping[int, int]) -> None:
        self.meanwhile()
        self._compute.forward(call, slots)
        self.meanwhile()
