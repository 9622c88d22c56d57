"""Layers one after another in one call to the C library, for a step of few tokens: the door to csrc/layers.c.

Between two layers the interpreter would come back to code and objects that the layers' weights have driven out of the
processor's caches. What runs without the library is what the call does; the bits are the same.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch

from quant.errors import BadShape, ExpertMissing
from quant.expert import LayerExperts
from quant.library import MISSING_EXPERT, check_status, library
from quant.segment import AttentionSegment, CStep, Step
from quant.workspace import Workspace


class _CLayer(ctypes.Structure):
    """struct expertd_layer of csrc/layer.h."""

    _fields_ = (("segment", ctypes.c_void_p), ("experts", ctypes.c_void_p), ("n_experts", ctypes.c_int64))


class Layers:
    """All layers of a model, whose experts are put into their tables as they are first used.

    Of the thread that computes, as the workspace demands.
    """

    def __init__(
        self, segments: Sequence[AttentionSegment], experts: Sequence[LayerExperts], *, workspace: Workspace
    ) -> None:
        """Keep both; raise BadShape if they are not of as many layers, or not computed alike."""
        if len(segments) != len(experts):
            raise BadShape(f"experts of {len(segments)} layers are expected, of {len(experts)} came")
        if any(segment.is_exact != of_layer.is_exact for segment, of_layer in zip(segments, experts, strict=True)):
            raise BadShape("segments and experts are to be computed alike, exactly or not; both came")
        self._segments, self._experts, self._workspace = segments, experts, workspace
        pairs = zip(segments, experts, strict=True)
        c_layers = [_CLayer(segment.address, of_layer.address, of_layer.n_experts) for segment, of_layer in pairs]
        self._c_layers = (_CLayer * len(c_layers))(*c_layers)

    def __call__(self, step: Step, first: int = 0) -> int:
        """Compute the layers from `first` on; return the one whose experts are still to be computed, or their number.

        It is one of whose chosen experts one was not put there yet. Of that layer all before the experts is computed,
        and the step's `added` is None: what its experts return is to be put there, before the layers behind it.
        """
        functions = _functions()
        if functions is None:
            return self._one_by_one(step, first)
        n_layers = len(self._segments)
        if first == n_layers:
            return n_layers
        n_computed = ctypes.c_int64()
        added = torch.empty_like(step.hidden_states)
        contributions = torch.empty(*step.expert_ids.shape, added.shape[1])
        status = functions.expertd_compute_layers(
            self._workspace.address,
            ctypes.byref(self._c_layers, first * ctypes.sizeof(_CLayer)),
            n_layers - first,
            ctypes.byref(step.c_step()),
            contributions.data_ptr(),
            added.data_ptr(),
            ctypes.byref(n_computed),
        )
        layer = first + n_computed.value
        if status and status != MISSING_EXPERT:
            check_status(status, f"layer {layer}")
        step.added = None if status else added
        return layer

    def _one_by_one(self, step: Step, first: int) -> int:
        for layer in range(first, len(self._segments)):
            self._segments[layer](step)
            try:
                step.added = self._experts[layer].forward(step.normed, step.expert_ids, step.expert_weights)
            except ExpertMissing:
                return layer
        return len(self._segments)


def _functions() -> ctypes.CDLL | None:
    loaded = library()
    return None if loaded is None else _typed(loaded)


@functools.cache
def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    address, count = ctypes.c_void_p, ctypes.c_int64
    loaded.expertd_compute_layers.argtypes = (
        address, address, count, ctypes.POINTER(CStep), address, address, ctypes.POINTER(count),
    )  # fmt: skip
    return loaded
