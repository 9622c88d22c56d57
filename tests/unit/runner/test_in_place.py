from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from protocol.handles import ExpertKey
from protocol.layout import R8, Part, record_nbytes, record_spans
from protocol.manifest import Manifest, ModelFacts, Record, TensorSchemes
from quant.encode import encode_part
from quant.workspace import Workspace
from runner.experts.in_place import InPlaceExperts, sum_in_order

HIDDEN, INTERMEDIATE, N_EXPERTS = 64, 128, 4
PARTS = tuple(
    Part(name, rows, cols, "bf16")
    for name, rows, cols in (("w1", INTERMEDIATE, HIDDEN), ("w3", INTERMEDIATE, HIDDEN), ("w2", HIDDEN, INTERMEDIATE))
)


@dataclass
class ExpertStore:
    """A StoreView of one layer of experts; `order` says whose record each expert has."""

    weights: list[dict[str, Tensor]]
    order: list[int]

    @property
    def manifest(self) -> Manifest:
        record = Record(R8, PARTS, "experts-00001.safetensors", 4096, record_nbytes(R8, PARTS), "0" * 32)
        return Manifest(
            model=ModelFacts("mixtral", 1, N_EXPERTS, 2, HIDDEN, INTERMEDIATE, "silu", "softmax", "top_k", 0),
            schemes=TensorSchemes("bf16", "bf16", "bf16", "bf16"),
            solver="shortcut",
            experts={ExpertKey(0, expert): record for expert in range(N_EXPERTS)},
            dense={},
            files=(),
        )

    def expert_record(self, key: ExpertKey) -> memoryview:
        data = torch.zeros(record_nbytes(R8, PARTS), dtype=torch.uint8)
        for span in record_spans(R8, PARTS):
            weight = self.weights[self.order[key.expert]][span.part.name]
            data[span.offset : span.offset + span.nbytes] = encode_part(weight, span.part, solver="shortcut")
        return memoryview(bytearray(data.tolist()))

    def dense_record(self, name: str) -> memoryview:
        raise AssertionError(name)

    def side_file(self, name: str) -> bytes | None:
        raise AssertionError(name)


@pytest.fixture(scope="module")
def weights() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {part.name: torch.randn(part.rows, part.cols, generator=generator).bfloat16() / 8 for part in PARTS}
        for _ in range(N_EXPERTS)
    ]


def choose(n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden_states [T, hidden], expert_ids and weights [T, 2]."""
    generator = torch.Generator().manual_seed(n_tokens)
    hidden_states = torch.randn(n_tokens, HIDDEN, generator=generator)
    gate_logits, expert_ids = torch.randn(n_tokens, N_EXPERTS, generator=generator).topk(2)
    return hidden_states, expert_ids, gate_logits.softmax(-1)


@pytest.mark.parametrize("n_tokens", [1, 2, 9, 40])
def test_the_output_is_the_weighted_sum_of_the_chosen_experts(weights: list[dict[str, Tensor]], n_tokens: int) -> None:
    hidden_states, expert_ids, gate_weights = choose(n_tokens)

    with Workspace() as workspace:
        experts = InPlaceExperts(ExpertStore(weights, [0, 1, 2, 3]), workspace)
        output = experts.forward(0, hidden_states, expert_ids, gate_weights)

    expected = torch.zeros(n_tokens, HIDDEN, dtype=torch.float64)
    for token in range(n_tokens):
        x = hidden_states[token].double()
        for expert, weight in zip(expert_ids[token].tolist(), gate_weights[token].double(), strict=True):
            w1, w2, w3 = (weights[expert][name].double() for name in ("w1", "w2", "w3"))
            expected[token] += weight * (w2 @ (silu(w1 @ x) * (w3 @ x)))
    # fp32 sums of 128 products against fp64.
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_the_order_in_which_experts_are_computed_changes_no_bit(
    weights: list[dict[str, Tensor]], n_tokens: int
) -> None:
    hidden_states, expert_ids, gate_weights = choose(n_tokens)
    # The same experts under other numbers: what was computed first is computed last.
    order = [3, 2, 1, 0]
    renamed = torch.tensor([order.index(expert) for expert in range(N_EXPERTS)])[expert_ids]

    with Workspace() as workspace:
        output = InPlaceExperts(ExpertStore(weights, [0, 1, 2, 3]), workspace).forward(
            0, hidden_states, expert_ids, gate_weights
        )
        reversed_output = InPlaceExperts(ExpertStore(weights, order), workspace).forward(
            0, hidden_states, renamed, gate_weights
        )

    assert torch.equal(output, reversed_output)


def test_contributions_are_added_in_the_gates_order() -> None:
    # In fp32, (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1.
    contributions = torch.tensor([[[1e8], [1.0], [-1e8]], [[1e8], [-1e8], [1.0]]])

    total = sum_in_order(contributions, torch.ones(2, 3))

    assert total.tolist() == [[0.0], [1.0]]
