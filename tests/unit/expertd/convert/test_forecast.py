from pathlib import Path

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.forecast import forecast_text, store_size, tiered_nbytes
from expertd.convert.memory import Crew
from expertd.convert.overrides import Override
from expertd.convert.plan import plan_store
from tests.support.checkpoints import write_checkpoint


def text_for(folder: Path, config: QuantizeConfig | None = None, *, is_fetched: bool = False) -> list[str]:
    text = forecast_text(
        "someone/model",
        read_checkpoint(folder),
        config or QuantizeConfig(),
        crew=Crew(2, 3_000_000_000),
        seconds=5400.0,
        is_fetched=is_fetched,
    )
    return text.splitlines()


def test_it_says_what_the_model_is_and_how_long_it_takes(tmp_path: Path) -> None:
    lines = text_for(write_checkpoint(tmp_path / "c", dtype="bf16", n_shards=3), is_fetched=True)

    assert lines[0] == (
        "someone/model: 2 layers of 4 experts, 2 per token, 0.00 billion weights, 0.00 GB in 3 shard(s)"
    )
    assert lines[-1] == (
        "time: about 90 min on this machine with 2 worker(s), measured on one expert, if the Hub sends as fast as "
        "that; they hold at most 3.00 GB"
    )


def test_every_scheme_has_a_row_and_the_configured_one_its_own(tmp_path: Path) -> None:
    lines = text_for(write_checkpoint(tmp_path / "c"), QuantizeConfig(experts="3bit-g64"))

    words = [line.split()[0] for line in lines[3:9]]
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:9]}

    assert words == ["16bit", "8bit-g64", "4bit-g64", "3bit-g64", "2bit-g16", "configured"]
    assert rows["configured"] == rows["3bit-g64"]


def test_a_store_larger_than_memory_takes_its_dense_weights_and_slots_of_its_largest_expert(tmp_path: Path) -> None:
    # Layer 1 has 16-bit experts: the largest record, whoever is in the slot.
    config = QuantizeConfig(override=(Override(nbits=16, layers="1"),))
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "c", hidden=512, intermediate=1024))
    records = plan_store(checkpoint, config).records
    dense_nbytes = sum(record.nbytes for record in records if record.key is None)
    largest_nbytes = max(record.nbytes for record in records if record.key is not None)

    size = store_size(plan_store(checkpoint, config))

    assert tiered_nbytes(size, 4) == dense_nbytes + 4 * largest_nbytes + 4096
    assert largest_nbytes == size.expert_nbytes == 3 * 512 * 1024 * 2


def test_the_least_and_half_of_the_experts_are_said_for_every_scheme(tmp_path: Path) -> None:
    lines = text_for(write_checkpoint(tmp_path / "c", hidden=512, intermediate=4096, n_experts=8, vocab=4096))

    # 16 experts of 12.6 MB in 16 bits, 3.4 in 4; dense 7.
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:9]}
    assert lines[2].split() == ["experts", "store", "one", "expert", "memory", "from", "half", "GPU", "from"]
    assert rows["16bit"] == ["0.21", "GB", "12.6", "MB", "0.06", "GB", "0.11", "GB", "0.06", "GB"]
    assert rows["4bit-g64"] == ["0.06", "GB", "3.4", "MB", "0.02", "GB", "0.03", "GB", "0.02", "GB"]
    assert any("the least that must lie there (4 experts at a time)" in line for line in lines)


def test_a_scheme_that_does_not_fit_the_model_says_so(tmp_path: Path) -> None:
    lines = text_for(write_checkpoint(tmp_path / "c", intermediate=96), QuantizeConfig(experts="16bit"))

    assert next(line for line in lines if "do not divide" in line).split()[:2] == ["8bit-g64", "-"]


def test_the_size_is_that_of_the_planned_records(tmp_path: Path) -> None:
    plan = plan_store(read_checkpoint(write_checkpoint(tmp_path / "c")), QuantizeConfig())

    size = store_size(plan)

    assert size.nbytes == sum(record.nbytes for record in plan.records)
    assert size.expert_nbytes * 8 == size.experts_nbytes
