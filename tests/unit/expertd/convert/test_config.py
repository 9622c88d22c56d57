import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from expertd.convert.config import QuantizeConfig, load_config
from expertd.convert.errors import ConfigError

CONFIGS = Path(__file__).parents[4] / "configs"
STORE_CONFIGS = sorted([*CONFIGS.glob("mixtral-*.toml"), CONFIGS / "demo.toml"])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", STORE_CONFIGS, ids=lambda path: path.name)
def test_every_shipped_file_sets_and_explains_every_option_and_its_default(path: Path) -> None:
    text = path.read_text()

    config = load_config(path)

    options = tomllib.loads(text)
    for field in fields(QuantizeConfig):
        if field.name == "override":
            continue  # a test of its own
        assert options[field.name] == getattr(config, field.name)
        comment = text[: text.index(f"\n{field.name} = ")].rsplit("\n\n", 1)[-1]
        default = "true" if field.default is True else f'"{field.default}"'
        assert f"Default: {default}" in comment


@pytest.mark.parametrize("path", STORE_CONFIGS, ids=lambda path: path.name)
def test_every_shipped_file_has_no_override_and_an_example_of_one_that_is_right(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    head, commented = text.split("# [[override]]\n")
    example = write(tmp_path / "c.toml", head + "[[override]]\n" + commented.replace("# ", ""))

    config, with_example = load_config(path), load_config(example)

    assert config.override == ()
    assert len(with_example.override) == 1
    assert with_example.override[0].scheme != config.experts


@pytest.mark.parametrize("path", STORE_CONFIGS, ids=lambda path: path.name)
def test_every_word_that_a_shipped_file_offers_is_accepted(path: Path) -> None:
    text = path.read_text()
    offered = {word for word in ("16bit", "8bit-g64", "4bit-g64", "3bit-g64", "2bit-g16") if f'"{word}"   ' in text}

    accepted = {word for word in offered if QuantizeConfig(experts=word, attention=word)}

    assert len(accepted) == 5


def test_there_is_a_shipped_file_for_each_size() -> None:
    names = {path.name for path in STORE_CONFIGS}

    schemes = {path.stem: load_config(path).experts for path in STORE_CONFIGS}

    assert names == {f"mixtral-8x7b-{size}.toml" for size in ("fp16", "4bit", "3bit", "2bit")} | {"demo.toml"}
    assert schemes["mixtral-8x7b-fp16"] == "16bit"
    assert schemes["mixtral-8x7b-4bit"] == "4bit-g64"
    assert schemes["mixtral-8x7b-3bit"] == "3bit-g64"
    assert schemes["mixtral-8x7b-2bit"] == "2bit-g16"


def test_an_option_that_is_left_out_has_its_default(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", 'experts = "3bit-g64"\n')

    config = load_config(path)

    assert config == QuantizeConfig(
        experts="3bit-g64", attention="4bit-g64", head="8bit-g64", solver="shortcut", refine=True
    )


def test_an_unknown_option_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", 'atention = "4bit-g64"\n')

    with pytest.raises(ConfigError) as refusal:
        load_config(path)

    assert str(refusal.value) == f"{path}: unknown option 'atention'; the nearest known one is 'attention'"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('solver = "fast"', "solver: one of 'shortcut', 'hqq' is expected, 'fast' came"),
        ('head = "2bit-g16"', "head: one of '16bit', '8bit-g64', '4bit-g64' is expected, '2bit-g16' came"),
        (
            "experts = 4",
            "experts: one of '16bit', '8bit-g64', '4bit-g64', '3bit-g64', '2bit-g16' is expected, 4 came",
        ),
        ('refine = "yes"', "refine: true or false is expected, 'yes' came"),
        ("[experts]", "experts: one of '16bit', '8bit-g64', '4bit-g64', '3bit-g64', '2bit-g16' is expected, {} came"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected_and_what_came(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = write(tmp_path / "c.toml", text)

    with pytest.raises(ConfigError) as refusal:
        load_config(path)

    assert str(refusal.value) == f"{path}: {expected}"


@pytest.mark.parametrize("data", [b"experts", b"\xff", b"[" * 100_000], ids=["no value", "no text", "deep"])
def test_what_is_no_toml_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(data)

    with pytest.raises(ConfigError, match="not TOML") as refusal:
        load_config(path)

    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"

    with pytest.raises(ConfigError) as refusal:
        load_config(path)

    assert str(refusal.value) == f"{path}: cannot be read (No such file or directory)"


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    with path.open("wb") as file:
        file.truncate(1 << 32)

    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load_config(path)
