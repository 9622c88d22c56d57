"""Mixtral on a device, in the order of the computation: the same model as models.mixtral, which says what is computed.

The dense weights and the kv_caches lie in the device's memory, and nothing comes back to the host but what it has to
decide on. What belongs to the compute queue is launched; the model's thread waits once a layer, for which experts were
chosen:

    attention_segment   hidden_states, normed, weights on the device; ids, weights and guesses to one small host buffer
    one event, one wait
    experts.forward     copies what is missing, launches what is there, then what was missing

and once for the logits. What a layer's arrays are used for next comes later in the same queue, so they are written over
without an event. The buffers to the host and back are used again only behind a wait for all that read or wrote them.

The position is the host's, for now: a captured graph would need it on the device. Letters as in models.mixtral.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from quant.layer_reference import rms_norm
from quant.segment import Step
from quant.triton_kernels import Products
from runner.devices.device import Device
from runner.devices.upload import upload
from runner.experts.source import ExpertSource
from runner.models.device_buffers import HostRows
from runner.models.device_lookahead import DeviceLookahead
from runner.models.device_segment import Arrays, Place, attention_segment, multiply
from runner.models.device_weights import DeviceWeights
from runner.models.mixtral import Ahead, LayerObserver, Piece, Routing
from runner.models.mixtral_config import MixtralConfig
from runner.models.rotary import RotaryAngles

# Rows whose logits are computed at once: a prompt's would be 128 KiB a token at 32,000 entries.
HEAD_ROWS = 64


@dataclass(slots=True)
class DeviceStep:
    """What observers and routings see of a step, as they see quant.segment's: the choice is the host's copy."""

    hidden_states: Tensor
    normed: Tensor
    added: Tensor | None
    expert_ids: Tensor
    expert_weights: Tensor


class DeviceMixtral:
    """One model over its weights. Holds no state between steps: that is the sequences'.

    Called from one thread. `lookahead` guesses on the device; `ahead` may be set to somebody else who does elsewhere.
    """

    def __init__(
        self,
        config: MixtralConfig,
        weights: DeviceWeights,
        experts: ExpertSource,
        device: Device,
        products: Products,
        *,
        lookahead: DeviceLookahead | None = None,
    ) -> None:
        self.config = config
        self._weights = weights
        self._experts = experts
        self._device = device
        self._products = products
        self._lookahead = lookahead
        self._angles = RotaryAngles(config.head_dim, config.rope_theta)
        self._inputs = HostRows(device, "inputs")
        self._choice = HostRows(device, "choice")
        self._logits = HostRows(device, "logits")
        self._is_in_step = False
        self.ahead: Ahead | None = lookahead
        self.routing: Routing | None = None
        self.observer: LayerObserver | None = None

    def gate_logits(self, layer: int, hidden_states: Tensor) -> Tensor:
        """Return what a layer's norm and gate give states that are not its own yet, fp32 [T, H] → [T, n_experts]."""
        weights = self._weights.layers[layer]
        out = torch.empty(hidden_states.shape[0], self.config.n_experts)

        def compute() -> None:
            states = hidden_states.to(self._products.device)
            normed = rms_norm(states, weights.post_attention_norm, self.config.rms_norm_eps)
            out.copy_(multiply(self._products, normed, weights.gate))

        with self._device.computing():
            self._device.launch(compute)
            self._device.drain()
        return out

    def forward(self, pieces: Sequence[Piece], wanted: Sequence[int]) -> Tensor:
        """Compute the pieces' tokens and return the logits of the rows that are wanted, fp32 [n_wanted, V].

        Rows count the tokens of all pieces, one piece after another. Raise CorruptExpert or ContextFull, or
        DeviceFailed; the kv_caches are then as they were.
        """
        for piece in pieces:
            piece.kv_cache.check_room(len(piece.token_ids))
        if self._is_in_step:
            self._device.drain()  # a step that failed may have left work that reads or writes the buffers
        self._is_in_step = True
        with self._device.computing():
            arrays, places = self._begin(pieces)
            added: Tensor | None = None
            for layer in range(self.config.n_layers):
                added = self._layer(layer, arrays, added, places)
            logits = self._head(arrays.hidden_states, added, list(wanted))
        self._is_in_step = False
        for piece in pieces:
            piece.kv_cache.advance(len(piece.token_ids))
        return logits

    def _begin(self, pieces: Sequence[Piece]) -> tuple[Arrays, list[Place]]:
        """Bring the tokens' embeddings and angles to the device."""
        config = self.config
        token_ids = torch.tensor([token_id for piece in pieces for token_id in piece.token_ids])
        places, angles, row = [], [], 0
        for piece in pieces:
            kv_cache, n_tokens = piece.kv_cache, len(piece.token_ids)
            places.append(Place(kv_cache.keys, kv_cache.values, kv_cache.length, slice(row, row + n_tokens)))
            angles.append(self._angles.of(kv_cache.length, kv_cache.length + n_tokens))
            row += n_tokens
        on_host = [self._weights.embed_tokens.rows(token_ids)]
        on_host += [torch.cat(of_pieces) for of_pieces in zip(*angles, strict=True)]
        arrays = Arrays.of(len(token_ids), config, self._products.device)
        targets = (arrays.hidden_states, arrays.cosines, arrays.sines)
        self._inputs.write(on_host)
        self._device.launch(partial(self._inputs.copy_out, targets), reads=[self._inputs.buffer])
        return arrays, places

    def _layer(self, layer: int, arrays: Arrays, added: Tensor | None, places: Sequence[Place]) -> Tensor:
        """Compute one layer; return what is to be added to hidden_states behind it."""
        expert_ids, expert_weights = self._chosen(layer, arrays, added, places)
        step = DeviceStep(arrays.hidden_states, arrays.normed, added, expert_ids, expert_weights)
        on_device = arrays.expert_weights
        if self.routing is not None:
            self.routing.route(layer, cast(Step, step))
            on_device = upload(step.expert_weights, self._products.device)
        if self.ahead is not None:
            for later, guess in self.ahead.guesses(layer, arrays.hidden_states):
                self._experts.prefetch(later, guess)
        step.added = self._experts.forward(layer, arrays.normed, step.expert_ids, on_device)
        if self.observer is not None:
            self._device.drain()  # it may read on the host
            self.observer.after_layer(layer, cast(Step, step))
        return step.added

    def _chosen(
        self, layer: int, arrays: Arrays, added: Tensor | None, places: Sequence[Place]
    ) -> tuple[Tensor, Tensor]:
        """Compute a layer before its experts; return the host's copy of ids and weights, both [T, top_k]."""
        n_tokens, top_k = arrays.expert_weights.shape
        lookahead = self._lookahead if self.ahead is self._lookahead else None
        later = [] if lookahead is None else lookahead.layers_to_guess(layer, n_tokens)
        n_cols = 2 * top_k + (0 if lookahead is None else lookahead.n_cols(later))
        on_host = self._choice.rows(n_tokens, n_cols)

        def compute() -> None:
            of_layer = (layer, self._weights.layers[layer])
            expert_ids = attention_segment(arrays, added, places, of_layer, config=self.config, products=self._products)
            guessed = [] if lookahead is None else lookahead.guessed(later, arrays.hidden_states)
            ids = [part.to(torch.int32) for part in (expert_ids, *guessed)]
            packed = torch.cat([arrays.expert_weights.view(torch.int32), *ids], dim=1)
            on_host.copy_(packed.view(torch.float32), non_blocking=True)

        self._device.launch(compute, writes=[self._choice.buffer])
        # The layer's one wait: which experts are needed is known only now.
        packed = self._choice.awaited(on_host)
        expert_weights, ids = packed[:, :top_k].contiguous(), packed.view(torch.int32)[:, top_k:].to(torch.int64)
        if lookahead is not None:
            lookahead.take(later, ids[:, top_k:])
        return ids[:, :top_k].contiguous(), expert_weights

    def _head(self, hidden_states: Tensor, added: Tensor | None, wanted: list[int]) -> Tensor:
        logits = torch.empty(len(wanted), self.config.vocab_size)
        for first in range(0, len(wanted), HEAD_ROWS):
            rows = wanted[first : first + HEAD_ROWS]
            logits[first : first + len(rows)] = self._head_rows(hidden_states, added, rows)
        if not wanted:
            self._device.drain()  # the buffers are used again by the next step
        return logits

    def _head_rows(self, hidden_states: Tensor, added: Tensor | None, rows: list[int]) -> Tensor:
        on_host = self._logits.rows(len(rows), self.config.vocab_size)

        def compute() -> None:
            picked = upload(torch.tensor(rows), self._products.device)
            last = None if added is None else added.index_select(0, picked)
            normed = rms_norm(
                hidden_states.index_select(0, picked), self._weights.norm, self.config.rms_norm_eps, added=last
            )
            on_host.copy_(multiply(self._products, normed, self._weights.lm_head), non_blocking=True)

        self._device.launch(compute, writes=[self._logits.buffer])
        return self._logits.awaited(on_host)
