"""Names the experts that the next layers are likely to choose, on a device: there, as part of a layer's own work.

The guess is computed behind the layer's choice, on the states behind its attention, and comes to the host together with
that choice: it costs no wait of its own. It is left out where nobody would follow it. Letters: T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from quant.layer_reference import choose_experts, rms_norm
from quant.triton_kernels import Products
from runner.experts.source import PREFILL_TOKENS_MIN, Guess
from runner.models.device_segment import multiply
from runner.models.device_weights import DeviceLayer


class DeviceLookahead:
    """The gates of all layers, asked ahead of time: `guessed` by the device's work, all else by the model's thread.

    `is_wanted` says of a layer whether a guess would be followed.
    """

    def __init__(
        self,
        layers: Sequence[DeviceLayer],
        eps: float,
        products: Products,
        *,
        n_guessed: int,
        depth: int,
        is_wanted: Callable[[int], bool],
    ) -> None:
        self._layers = layers
        self._eps = eps
        self._products = products
        self._n_guessed = n_guessed
        self._depth = depth
        self._is_wanted = is_wanted
        self._all = torch.arange(layers[0].gate.part.rows)
        self._on_host: dict[int, Tensor] = {}  # layer → its guess, int64 [T, n_guessed]

    def n_cols(self, later: Sequence[int]) -> int:
        """Return how many ids a token's guesses for those layers are."""
        return len(later) * self._n_guessed

    def layers_to_guess(self, layer: int, n_tokens: int) -> list[int]:
        """Return the later layers whose experts are to be guessed with that layer's states; none for many tokens."""
        if n_tokens >= PREFILL_TOKENS_MIN:
            return []
        return [later for later in self._ahead_of(layer) if self._is_wanted(later)]

    def guessed(self, later: Sequence[int], hidden_states: Tensor) -> list[Tensor]:
        """Return the ids for each of those layers, int64 [T, n_guessed], on the device."""
        return [self._guess(self._layers[layer], hidden_states) for layer in later]

    def take(self, later: Sequence[int], on_host: Tensor) -> None:
        """Keep what was guessed for those layers, [T, n_cols], until `guesses` is asked."""
        parts = torch.split(on_host, self._n_guessed, dim=1) if later else ()
        self._on_host = dict(zip(later, parts, strict=True))

    def guesses(self, layer: int, hidden_states: Tensor) -> Iterator[tuple[int, Guess]]:
        """Yield the layers ahead with what is likely to be chosen there, the next one first."""
        if hidden_states.shape[0] >= PREFILL_TOKENS_MIN:
            for later in self._ahead_of(layer):
                yield later, partial(torch.Tensor.clone, self._all)
        for later, on_host in self._on_host.items():
            yield later, partial(torch.Tensor.clone, on_host)

    def _ahead_of(self, layer: int) -> range:
        return range(layer + 1, min(layer + 1 + self._depth, len(self._layers)))

    def _guess(self, weights: DeviceLayer, hidden_states: Tensor) -> Tensor:
        normed = rms_norm(hidden_states, weights.post_attention_norm, self._eps)
        return choose_experts(multiply(self._products, normed, weights.gate), self._n_guessed)[0]
