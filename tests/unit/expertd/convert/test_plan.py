from pathlib import Path

import pytest

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.errors import GroupsDoNotDivide
from expertd.convert.plan import PlannedRecord, plan_store
from protocol.handles import ExpertKey
from protocol.layout import Part, record_nbytes
from tests.support.checkpoints import write_checkpoint

DENSE_NAMES_OF_A_LAYER = ["input_norm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_norm", "gate"]


def records_of(folder: Path, config: QuantizeConfig | None = None) -> dict[str, PlannedRecord]:
    checkpoint = read_checkpoint(folder)
    return {record.name: record for record in plan_store(checkpoint, config or QuantizeConfig()).records}


def test_dense_records_come_in_the_order_of_the_computation_and_experts_after_them(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", n_layers=2, n_experts=4)

    names = list(records_of(folder))

    layers = [f"layers.{layer}.{name}" for layer in range(2) for name in DENSE_NAMES_OF_A_LAYER]
    experts = [f"layers.{layer}.experts.{expert}" for layer in range(2) for expert in range(4)]
    assert names == ["embed_tokens", *layers, "norm", "lm_head", *experts]


def test_a_tied_checkpoint_has_no_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tied=True)

    names = list(records_of(folder))

    assert "lm_head" not in names
    assert "embed_tokens" in names


def test_an_expert_is_its_three_matrices_in_the_order_w1_w3_w2(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", hidden=64, intermediate=128)

    record = records_of(folder, QuantizeConfig(experts="3bit-g64"))["layers.1.experts.3"]

    assert record.key == ExpertKey(1, 3)
    assert record.parts == (
        Part("w1", 128, 64, "3bit-g64"),
        Part("w3", 128, 64, "3bit-g64"),
        Part("w2", 64, 128, "3bit-g64"),
    )
    assert [matrix.hub_name for matrix in record.matrices] == [
        f"model.layers.1.block_sparse_moe.experts.3.{name}.weight" for name in ("w1", "w3", "w2")
    ]


def test_every_class_has_its_scheme_and_what_has_none_stays_in_16_bits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", dtype="bf16")

    records = records_of(folder, QuantizeConfig(experts="2bit-g16", attention="4bit-g64", head="8bit-g64"))

    schemes = {name: record.parts[0].scheme for name, record in records.items() if ".1." not in name}
    assert {name: scheme for name, scheme in schemes.items() if scheme == "bf16"}.keys() == {
        "embed_tokens",
        "norm",
        "layers.0.input_norm",
        "layers.0.post_attention_norm",
        "layers.0.gate",
    }
    assert schemes["layers.0.experts.0"] == "2bit-g16"
    assert schemes["layers.0.o_proj"] == "4bit-g64"
    assert schemes["lm_head"] == "8bit-g64"


def test_records_fill_their_file_without_holes_and_start_pages(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c")

    checkpoint = read_checkpoint(folder)
    plan = plan_store(checkpoint, QuantizeConfig())

    for file in plan.files:
        end = len(file.header)
        for record in (record for record in plan.records if record.file == file.name):
            assert record.offset == end
            assert record.offset % 4096 == 0
            assert record.nbytes == record_nbytes("r8", record.parts)
            end += record.nbytes
        assert file.nbytes == end


def test_a_file_of_experts_ends_before_it_would_pass_its_limit(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", n_layers=1, n_experts=5)
    nbytes = records_of(folder)["layers.0.experts.0"].nbytes

    checkpoint = read_checkpoint(folder)
    plan = plan_store(checkpoint, QuantizeConfig(), file_nbytes_max=2 * nbytes)

    assert {record.name: record.file for record in plan.records if record.key is not None} == {
        "layers.0.experts.0": "experts-00001.safetensors",
        "layers.0.experts.1": "experts-00001.safetensors",
        "layers.0.experts.2": "experts-00002.safetensors",
        "layers.0.experts.3": "experts-00002.safetensors",
        "layers.0.experts.4": "experts-00003.safetensors",
    }
    assert [file.name for file in plan.files[1:]] == [f"experts-0000{n}.safetensors" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("shape", "config", "expected"),
    [
        (
            {"intermediate": 96},
            QuantizeConfig(experts="2bit-g16"),
            "model.layers.0.block_sparse_moe.experts.0.w2.weight: 96 inputs do not divide into blocks of 64, which "
            'scheme 2bit-g16 needs; store it in 16 bits: experts = "16bit"',
        ),
        (
            {"head_dim": 8},
            QuantizeConfig(),
            "model.layers.0.self_attn.o_proj.weight: 32 inputs do not divide into blocks of 64, which scheme 4bit-g64 "
            'needs; store it in 16 bits: attention = "16bit"',
        ),
        (
            {"hidden": 32, "intermediate": 64},
            QuantizeConfig(experts="16bit", attention="16bit"),
            "lm_head.weight: 32 inputs do not divide into blocks of 64, which scheme 8bit-g64 needs; store it in 16 "
            'bits: head = "16bit"',
        ),
    ],
)
def test_groups_that_do_not_divide_are_refused_with_the_tensor_and_the_remedy(
    tmp_path: Path, shape: dict[str, int], config: QuantizeConfig, expected: str
) -> None:
    folder = write_checkpoint(tmp_path / "c", **shape)  # type: ignore[arg-type]

    with pytest.raises(GroupsDoNotDivide) as refusal:
        records_of(folder, config)

    assert str(refusal.value) == expected


def test_what_does_not_divide_is_fine_in_16_bits(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", hidden=40, intermediate=50)

    records = records_of(folder, QuantizeConfig(experts="16bit", attention="16bit", head="16bit"))

    assert records["layers.0.experts.0"].parts[2] == Part("w2", 40, 50, "fp16")
