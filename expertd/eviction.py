"""Which of the experts in slots is given up next. Pure: knows neither slots nor sessions nor clocks.

A token goes through the layers in order and comes back to each with the next token. Of all experts together, the least
recently used one would be that of the layer that is needed soonest: with fewer slots than a token uses experts, each
would be given up just before it is needed. So the layers share the slots evenly: the layer that has most of them gives
up its least recently used expert. Of layers that have equally many, that which was passed last is needed last.
"""

from collections import Counter, OrderedDict

from protocol.handles import ExpertKey

# More than a store has: a layer that is still to come is needed sooner than any that was passed.
_LAYERS_MAX = 1 << 16


class EvictionOrder:
    """The experts that lie in slots; those that may be given up, by layer, in the order of their last use."""

    def __init__(self) -> None:
        self._n_held: Counter[int] = Counter()  # by layer
        self._evictable: dict[int, OrderedDict[ExpertKey, None]] = {}

    def hold(self, key: ExpertKey) -> None:
        """Note that an expert has a slot."""
        self._n_held[key.layer] += 1

    def let_go(self, key: ExpertKey) -> None:
        """Note that it has none any more."""
        self._n_held[key.layer] -= 1
        self.keep(key)

    def offer(self, key: ExpertKey) -> None:
        """Note that an expert was used just now and may be given up."""
        of_layer = self._evictable.setdefault(key.layer, OrderedDict())
        of_layer[key] = None
        of_layer.move_to_end(key)

    def keep(self, key: ExpertKey) -> None:
        """Note that an expert may not be given up."""
        of_layer = self._evictable.get(key.layer)
        if of_layer is not None and key in of_layer:
            del of_layer[key]
            if not of_layer:
                del self._evictable[key.layer]

    def touch(self, key: ExpertKey) -> None:
        """Note that an expert was used just now, if it may be given up."""
        if key in self._evictable.get(key.layer, ()):
            self.offer(key)

    def victim(self, key: ExpertKey, *, is_hint: bool) -> ExpertKey | None:
        """Return which expert makes room for this one; None if none may."""
        if not self._evictable:
            return None
        # What is foreseen is of a layer to come, whose experts stay, and so do those of the layer that foresees.
        passed = key.layer - 2 if is_hint else key.layer

        def order(layer: int) -> tuple[int, int]:
            is_own = layer == key.layer and not is_hint
            return -(self._n_held[layer] + is_own), (passed - layer) % _LAYERS_MAX

        return next(iter(self._evictable[min(self._evictable, key=order)]))
