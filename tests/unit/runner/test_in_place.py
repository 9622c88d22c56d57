"""Experts from a store in memory: the right ones, each fetched once and none that was not chosen."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from protocol.handles import ExpertKey
from protocol.layout import R8, Part, record_nbytes, record_spans
from protocol.manifest import Manifest, ModelFacts, Record, TensorSchemes
from quant.encode import encode_part
from quant.library import has_c_library
from quant.workspace import Workspace
from runner.errors import CorruptExpert
from runner.experts.in_place import InPlaceExperts

HIDDEN, INTERMEDIATE, N_EXPERTS, N_LAYERS = 64, 128, 4, 2
PARTS = tuple(
    Part(name, rows, cols, "bf16")
    for name, rows, cols in (("w1", INTERMEDIATE, HIDDEN), ("w3", INTERMEDIATE, HIDDEN), ("w2", HIDDEN, INTERMEDIATE))
)


@dataclass
class ExpertStore:
    """A StoreView of two layers of the same experts; notes whose records were asked for."""

    weights: list[dict[str, Tensor]]
    asked: list[ExpertKey] = field(default_factory=list)
    corrupt: ExpertKey | None = None

    @property
    def manifest(self) -> Manifest:
        record = Record(R8, PARTS, "experts-00001.safetensors", 4096, record_nbytes(R8, PARTS), "0" * 32)
        return Manifest(
            model=ModelFacts("mixtral", N_LAYERS, N_EXPERTS, 2, HIDDEN, INTERMEDIATE, "silu", "softmax", "top_k", 0),
            schemes=TensorSchemes("bf16", "bf16", "bf16", "bf16"),
            solver="shortcut",
            experts={ExpertKey(layer, expert): record for layer in range(N_LAYERS) for expert in range(N_EXPERTS)},
            dense={},
            files=(),
        )

    @property
    def host_slots(self) -> None:
        return None

    def expert_record(self, key: ExpertKey) -> memoryview:
        self.asked.append(key)
        if key == self.corrupt:
            raise CorruptExpert(f"{key}: its bytes are not those that were stored")
        data = torch.zeros(record_nbytes(R8, PARTS), dtype=torch.uint8)
        for span in record_spans(R8, PARTS):
            weight = self.weights[key.expert][span.part.name]
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
        experts = InPlaceExperts(ExpertStore(weights), workspace)
        output = experts.forward(0, hidden_states, expert_ids, gate_weights)

    expected = torch.zeros(n_tokens, HIDDEN, dtype=torch.float64)
    for token in range(n_tokens):
        x = hidden_states[token].double()
        for expert, weight in zip(expert_ids[token].tolist(), gate_weights[token].double(), strict=True):
            w1, w2, w3 = (weights[expert][name].double() for name in ("w1", "w2", "w3"))
            expected[token] += weight * (w2 @ (silu(w1 @ x) * (w3 @ x)))
    # fp32 sums of 128 products against fp64.
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_only_the_records_of_chosen_experts_are_asked_for_each_once(weights: list[dict[str, Tensor]]) -> None:
    store = ExpertStore(weights)
    hidden_states = torch.ones(2, HIDDEN)

    with Workspace() as workspace:
        experts = InPlaceExperts(store, workspace)
        experts.prefetch(0, lambda: torch.tensor([[0, 1]]))
        for layer, ids in ((1, [[3, 1], [1, 3]]), (1, [[1, 3], [3, 1]]), (1, [[1, 2], [2, 1]]), (0, [[3, 1], [3, 1]])):
            experts.forward(layer, hidden_states, torch.tensor(ids), torch.ones(2, 2))

    assert sorted(store.asked[:2]) == [ExpertKey(1, 1), ExpertKey(1, 3)]
    assert store.asked[2] == ExpertKey(1, 2)
    assert sorted(store.asked[3:]) == [ExpertKey(0, 1), ExpertKey(0, 3)]


def test_a_corrupt_record_is_not_computed_with(weights: list[dict[str, Tensor]]) -> None:
    store = ExpertStore(weights, corrupt=ExpertKey(0, 2))
    hidden_states, gate_weights = torch.ones(1, HIDDEN), torch.ones(1, 2)

    with Workspace() as workspace:
        experts = InPlaceExperts(store, workspace)
        with pytest.raises(CorruptExpert):
            experts.forward(0, hidden_states, torch.tensor([[1, 2]]), gate_weights)
        with pytest.raises(CorruptExpert):
            experts.forward(0, hidden_states, torch.tensor([[1, 2]]), gate_weights)

        others = experts.forward(0, hidden_states, torch.tensor([[1, 3]]), gate_weights)

    assert bool(others.isfinite().all())


@pytest.mark.parametrize("exact", [False, True])
def test_a_round_of_tokens_gives_each_what_it_gets_alone(weights: list[dict[str, Tensor]], *, exact: bool) -> None:
    hidden_states, expert_ids, gate_weights = choose(9)

    with Workspace(2) as workspace:
        experts = InPlaceExperts(ExpertStore(weights), workspace, exact=exact)
        together = experts.forward(0, hidden_states, expert_ids, gate_weights)
        alone = [
            experts.forward(0, hidden_states[t : t + 1], expert_ids[t : t + 1], gate_weights[t : t + 1])
            for t in range(9)
        ]

    # Bit for bit with the library; torch, which computes without it, groups tokens and rounds otherwise.
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=0 if has_c_library() else 1e-5)
