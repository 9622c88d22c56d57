from pathlib import Path

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.config import QuantizeConfig
from expertd.convert.forecast import forecast_text, store_size
from expertd.convert.plan import plan_store
from tests.support.checkpoints import write_checkpoint


def text_for(folder: Path, config: QuantizeConfig | None = None, *, is_fetched: bool = False) -> list[str]:
    text = forecast_text(
        "someone/model",
        read_checkpoint(folder),
        config or QuantizeConfig(),
        n_jobs=2,
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
        "time: about 90 min on this machine with 2 worker(s), measured on one expert, if the Hub sends as fast as that"
    )


def test_every_scheme_has_a_row_and_the_configured_one_its_own(tmp_path: Path) -> None:
    lines = text_for(write_checkpoint(tmp_path / "c"), QuantizeConfig(experts="3bit-g64"))

    words = [line.split()[0] for line in lines[3:9]]
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:9]}

    assert words == ["16bit", "8bit-g64", "4bit-g64", "3bit-g64", "2bit-g16", "configured"]
    assert rows["configured"] == rows["3bit-g64"]


def test_a_scheme_that_does_not_fit_the_model_says_so(tmp_path: Path) -> None:
    lines = text_for(write_checkpoint(tmp_path / "c", intermediate=96), QuantizeConfig(experts="16bit"))

    assert next(line for line in lines if "do not divide" in line).split()[:2] == ["8bit-g64", "-"]


def test_the_size_is_that_of_the_planned_records(tmp_path: Path) -> None:
    plan = plan_store(read_checkpoint(write_checkpoint(tmp_path / "c")), QuantizeConfig())

    size = store_size(plan)

    assert size.nbytes == sum(record.nbytes for record in plan.records)
    assert size.expert_nbytes * 8 == size.experts_nbytes
