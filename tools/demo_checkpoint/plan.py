"""Which tensors the checkpoint holds, in which order, and how each is made from the dense source.

Knows Hugging Face's names and GGUF's; knows no files. Nothing is computed until a planned tensor is made, so that
one tensor at a time is in memory (and the dequantized feed-forward of one layer, which its experts share).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tools.demo_checkpoint.errors import SourceError
from tools.demo_checkpoint.noise import uniform
from tools.demo_checkpoint.source import Source, SourceFacts

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Options:
    """What is built: `noise` in Q4_1 steps of the source, the first `n_layers` layers, one of DTYPES."""

    noise: float
    n_layers: int
    tie: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the checkpoint; `make` returns it as float32 of that shape."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Matrix]


def tensor_plan(source: Source, gates: NDArray[np.uint16], options: Options) -> list[PlannedTensor]:
    """Return the tensors of the checkpoint in file order; gates are bf16 bits, [layers, experts, hidden_size]."""
    facts = source.facts
    _check_gates(gates, facts, options)
    hidden, vocab = facts.hidden_size, facts.vocab_size
    embedding = partial(source.weights, "token_embd.weight")
    plan = [PlannedTensor("model.embed_tokens.weight", (vocab, hidden), embedding)]
    for layer in range(options.n_layers):
        plan += _attention(source, layer)
        gate = partial(_floats, gates[layer])
        plan.append(PlannedTensor(f"model.layers.{layer}.block_sparse_moe.gate.weight", gates.shape[1:], gate))
        plan += _experts(source, layer, gates.shape[1], options.noise)
    plan.append(PlannedTensor("model.norm.weight", (hidden,), partial(source.weights, "output_norm.weight")))
    if not options.tie:
        plan.append(PlannedTensor("lm_head.weight", (vocab, hidden), embedding))
    return plan


def _check_gates(gates: NDArray[np.uint16], facts: SourceFacts, options: Options) -> None:
    if not 0 < options.n_layers <= facts.n_layers:
        raise SourceError(f"--layers: 1 to {facts.n_layers} can be built from this source, {options.n_layers} came")
    if gates.shape[0] < options.n_layers or gates.shape[2] != facts.hidden_size:
        raise SourceError(
            f"the gates are for {gates.shape[0]} layers of hidden size {gates.shape[2]}, "
            f"this source has {options.n_layers} of {facts.hidden_size}"
        )


def _attention(source: Source, layer: int) -> Iterator[PlannedTensor]:
    facts = source.facts
    hidden = facts.hidden_size
    kv_rows = facts.n_kv_heads * hidden // facts.n_heads
    in_file, in_source = f"model.layers.{layer}", f"blk.{layer}"

    def planned(name: str, shape: tuple[int, ...], source_name: str) -> PlannedTensor:
        make = partial(source.weights, f"{in_source}.{source_name}.weight")
        return PlannedTensor(f"{in_file}.{name}.weight", shape, make)

    def rotated(name: str, rows: int, source_name: str, n_heads: int) -> PlannedTensor:
        make = partial(_unpermuted, source, f"{in_source}.{source_name}.weight", n_heads)
        return PlannedTensor(f"{in_file}.{name}.weight", (rows, hidden), make)

    yield planned("input_layernorm", (hidden,), "attn_norm")
    yield rotated("self_attn.q_proj", hidden, "attn_q", facts.n_heads)
    yield rotated("self_attn.k_proj", kv_rows, "attn_k", facts.n_kv_heads)
    yield planned("self_attn.v_proj", (kv_rows, hidden), "attn_v")
    yield planned("self_attn.o_proj", (hidden, hidden), "attn_output")
    yield planned("post_attention_layernorm", (hidden,), "ffn_norm")


def _experts(source: Source, layer: int, n_experts: int, noise: float) -> Iterator[PlannedTensor]:
    hidden, intermediate = source.facts.hidden_size, source.facts.intermediate_size
    matrices = (
        ("w1", (intermediate, hidden), _NoisyMatrix(source, f"blk.{layer}.ffn_gate.weight", noise)),
        ("w2", (hidden, intermediate), _NoisyMatrix(source, f"blk.{layer}.ffn_down.weight", noise)),
        ("w3", (intermediate, hidden), _NoisyMatrix(source, f"blk.{layer}.ffn_up.weight", noise)),
    )
    for expert in range(n_experts):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        for index, (name, shape, matrix) in enumerate(matrices):
            # Every matrix of every expert has its own noise: the key counts them, from 1.
            key = (layer * n_experts + expert) * len(matrices) + index + 1
            is_last = expert == n_experts - 1
            make = partial(matrix.with_noise, key, is_last=is_last)
            yield PlannedTensor(f"{prefix}.{name}.weight", shape, make)


class _NoisyMatrix:
    """One feed-forward matrix of the source, dequantized at its first expert and forgotten after its last."""

    def __init__(self, source: Source, name: str, noise: float) -> None:
        self._source = source
        self._name = name
        self._noise = noise
        self._weights: Matrix | None = None
        self._steps: Matrix | None = None

    def with_noise(self, key: int, *, is_last: bool) -> Matrix:
        """Return the weights plus noise, uniform in ±noise/2 of each weight's own quantization step, [rows, cols]."""
        weights = self._source.weights(self._name) if self._weights is None else self._weights
        self._weights = None if is_last else weights
        if not self._noise:
            return weights
        steps = self._source.steps(self._name) if self._steps is None else self._steps
        self._steps = None if is_last else steps
        return weights + uniform(weights.size, key).reshape(weights.shape) * steps * np.float32(self._noise)


def _unpermuted(source: Source, name: str, n_heads: int) -> Matrix:
    """Return a query or key projection with its rows as Hugging Face orders them.

    GGUF interleaves the two halves of each head, so that rotary pairs are neighbours; Hugging Face rotates halves.
    """
    weights = source.weights(name)  # [n_heads * head_dim, hidden_size]
    paired = weights.reshape(n_heads, weights.shape[0] // n_heads // 2, 2, weights.shape[1])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(weights.shape)


def _floats(bf16_bits: NDArray[np.uint16]) -> Matrix:
    return (bf16_bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
