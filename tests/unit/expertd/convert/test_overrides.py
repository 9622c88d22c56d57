import json
from pathlib import Path

import pytest

from expertd.convert.checkpoint import read_checkpoint
from expertd.convert.config import QuantizeConfig, load_config
from expertd.convert.errors import ConfigError, GroupsDoNotDivide
from expertd.convert.overrides import OVERRIDES_MAX, Override
from expertd.convert.plan import plan_store
from expertd.convert.worker_messages import Job, dump_job, load_job
from protocol.handles import ExpertKey
from tests.support.checkpoints import write_checkpoint

SHAPE = {"n_layers": 4, "n_experts": 3}


def loaded(folder: Path, text: str) -> QuantizeConfig:
    path = folder / "c.toml"
    path.write_text(text)
    return load_config(path)


def schemes_of(folder: Path, config: QuantizeConfig) -> dict[ExpertKey, str]:
    checkpoint = write_checkpoint(folder / "checkpoint", **SHAPE)  # type: ignore[arg-type]
    source = read_checkpoint(checkpoint)
    return {record.key: record.parts[0].scheme for record in plan_store(source, config).records if record.key}


def test_layers_get_a_scheme_of_their_own(tmp_path: Path) -> None:
    config = loaded(tmp_path, 'experts = "2bit-g16"\n[[override]]\nlayers = "0-1,3"\nnbits = 4')

    schemes = schemes_of(tmp_path, config)

    assert {key.layer for key, scheme in schemes.items() if scheme == "4bit-g64"} == {0, 1, 3}
    assert {key.layer for key, scheme in schemes.items() if scheme == "2bit-g16"} == {2}


def test_single_experts_get_one_in_every_layer_or_in_some(tmp_path: Path) -> None:
    config = loaded(
        tmp_path, '[[override]]\nexperts = "1"\nnbits = 3\n[[override]]\nlayers = "2"\nexperts = "0, 2"\nnbits = 8'
    )

    schemes = schemes_of(tmp_path, config)

    assert {key for key, scheme in schemes.items() if scheme == "3bit-g64"} == {ExpertKey(n, 1) for n in range(4)}
    assert {key for key, scheme in schemes.items() if scheme == "8bit-g64"} == {ExpertKey(2, 0), ExpertKey(2, 2)}


def test_of_several_that_hold_the_last_one_counts() -> None:
    config = QuantizeConfig(override=(Override(4, layers="0-3"), Override(2, layers="3-5"), Override(8, experts="7")))

    schemes = [config.scheme_of(ExpertKey(3, expert)) for expert in (0, 7)]

    assert schemes == ["2bit-g16", "8bit-g64"]


def test_sixteen_bits_are_the_checkpoints_own_type(tmp_path: Path) -> None:
    schemes = schemes_of(tmp_path, QuantizeConfig(override=(Override(16, layers="1"),)))

    assert {key.layer for key, scheme in schemes.items() if scheme == "fp16"} == {1}


def test_a_worker_is_told_of_them() -> None:
    job = Job("f", "t", ("d",), QuantizeConfig(override=(Override(4, layers="0-3"), Override(2, experts="1"))))

    told = load_job(dump_job(job))

    assert told == job
    assert json.loads(dump_job(job))["config"]["override"][0] == {"nbits": 4, "layers": "0-3", "experts": None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[[override]]\nlayers = "0"', "override 1: nbits is missing"),
        ("[[override]]\nnbits = 4", "override 1: layers, experts or both are expected; the option 'experts' outside"),
        ('[[override]]\nlayers = "0"\nnbits = 5', "override 1: nbits: one of 16, 8, 4, 3, 2 is expected, 5 came"),
        ('[[override]]\nlayers = "0"\nnbits = true', "override 1: nbits: one of 16, 8, 4, 3, 2 is expected, True came"),
        ('[[override]]\nlayers = "0"\nnbits = [4]', "override 1: nbits: one of 16, 8, 4, 3, 2 is expected"),
        (
            '[[override]]\nlayer = "0"\nnbits = 4',
            "override 1: unknown option 'layer'; the nearest known one is 'layers'",
        ),
        ("[[override]]\nlayers = 3\nnbits = 4", 'override 1: layers: a text like "0-3,7" is expected, 3 came'),
        ('[[override]]\nlayers = "3-1"\nnbits = 4', "override 1: layers: numbers and spans from low to high"),
        ('[[override]]\nlayers = ""\nnbits = 4', "override 1: layers: numbers and spans from low to high"),
        ('[[override]]\nexperts = "-1"\nnbits = 4', "override 1: experts: numbers and spans from low to high"),
        ('[[override]]\nexperts = "1,,2"\nnbits = 4', "override 1: experts: numbers and spans from low to high"),
        ('[override]\nlayers = "0"\nnbits = 4', r"override: tables \[\[override\]\] are expected"),
        ("override = [4]", "override 1: a table is expected, 4 came"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_file_and_number(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as refusal:
        loaded(tmp_path, text)

    assert str(refusal.value).startswith(f"{tmp_path / 'c.toml'}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (Override(4, layers="0-4"), "override 2: layers: 4 came, this model has layers 0 to 3"),
        (Override(4, experts="3"), "override 2: experts: 3 came, this model has experts 0 to 2"),
    ],
)
def test_layers_and_experts_that_the_model_has_not_are_refused(
    tmp_path: Path, override: Override, expected: str
) -> None:
    config = QuantizeConfig(override=(Override(4, layers="0"), override))

    with pytest.raises(ConfigError) as refusal:
        schemes_of(tmp_path, config)

    assert str(refusal.value) == expected


def test_there_is_a_limit_to_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=f"at most {OVERRIDES_MAX} tables"):
        QuantizeConfig(override=(Override(4, layers="0"),) * (OVERRIDES_MAX + 1))


def test_an_override_that_needs_16_bits_says_so_itself(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", intermediate=96, **SHAPE)  # type: ignore[arg-type]

    source = read_checkpoint(checkpoint)
    with pytest.raises(GroupsDoNotDivide) as refusal:
        plan_store(source, QuantizeConfig(experts="16bit", override=(Override(4, layers="2"),)))

    assert str(refusal.value).endswith("store it in 16 bits: nbits = 16 in the override for layers.2.experts.0")
