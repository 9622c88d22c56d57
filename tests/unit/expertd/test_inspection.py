"""What people and programs read of a store."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.inspection import inspect_json, inspect_text
from protocol.handles import ExpertKey
from protocol.layout import record_nbytes
from protocol.manifest import Manifest, Record

N_WEIGHTS = 3 * 128 * 64


def in_scheme(record: Record, scheme: str) -> Record:
    parts = tuple(replace(part, scheme=scheme) for part in record.parts)
    return replace(record, parts=parts, nbytes=record_nbytes(record.layout_id, parts))


@pytest.fixture
def measured(manifest: Manifest) -> Manifest:
    """Two layers of four experts; one expert of the second layer at 2 bits, with its error."""
    odd = ExpertKey(1, 2)
    experts = manifest.experts | {odd: in_scheme(manifest.experts[odd], "2bit-g16")}
    errors = {str(key): (0.3, 0.3, 0.2) if key == odd else (0.08, 0.08, 0.06) for key in experts}
    return replace(manifest, experts=experts, weight_errors=errors | {"norm": (0.0,)})


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the table under the words, which are at least two spaces apart."""
    table = text.split("\n\n")[1].splitlines()
    return [[cell for cell in line.split("  ") if cell] for line in table]


def test_it_shows_model_schemes_and_sizes(manifest: Manifest) -> None:
    text = inspect_text(Path("/models/mixtral"), manifest)

    assert f"format 2, digest {manifest.digest[:12]}" in text
    assert "2 layers of 4 experts, 2 per token" in text
    assert "w1 128 x 64 4bit-g64" in text
    assert "config.json" in text


def test_a_layer_is_a_row_of_schemes_sizes_and_errors(measured: Manifest) -> None:
    head, first, second = rows_of(inspect_text(Path("/store"), measured))

    nbytes = [sum(r.nbytes for k, r in measured.experts.items() if k.layer == layer) for layer in (0, 1)]
    bits = [f"{total * 8 / (4 * N_WEIGHTS):.3f}" for total in nbytes]
    assert [cell.strip() for cell in head] == [
        "layer", "experts", "GB", "bits", "w1", "w3", "w2", "worst", "attention",
    ]  # fmt: skip
    assert [cell.strip() for cell in first] == [
        "0", "4bit-g64", "0.00", bits[0], "0.0800", "0.0800", "0.0600", "0.0800", "-",
    ]  # fmt: skip
    # The root of the mean square: ((3 * 0.08^2 + 0.3^2) / 4)^0.5.
    assert [cell.strip() for cell in second] == [
        "1", "3 4bit-g64, 1 2bit-g16 (expert 2)", "0.00", bits[1], "0.1652", "0.1652", "0.1127", "0.3000", "-",
    ]  # fmt: skip


def test_what_was_not_measured_is_a_dash(manifest: Manifest) -> None:
    _, first, _ = rows_of(inspect_text(Path("/store"), manifest))

    assert [cell.strip() for cell in first][4:] == ["-"] * 5


def test_the_mixture_of_all_experts_stands_on_top(measured: Manifest) -> None:
    text = inspect_text(Path("/store"), measured)

    bits = measured.experts_nbytes * 8 / (8 * N_WEIGHTS)
    assert f"experts     7 4bit-g64, 1 2bit-g16, 0.00 GB, {bits:.3f} bits per weight" in text


def test_every_kind_of_expert_is_shown(measured: Manifest) -> None:
    lines = inspect_text(Path("/store"), measured).splitlines()

    first = next(number for number, line in enumerate(lines) if line.startswith("one expert"))
    assert "w1 128 x 64 4bit-g64" in lines[first]
    assert lines[first + 1].startswith("or ")
    assert "w1 128 x 64 2bit-g16" in lines[first + 1]
    assert not lines[first + 2].startswith("or ")


def test_as_json_it_agrees_with_the_manifest(measured: Manifest) -> None:
    document = json.loads(json.dumps(inspect_json(measured), allow_nan=False))

    assert document["digest"] == measured.digest
    assert document["n_experts_in_all"] == 8
    assert document["expert_nbytes"] == max(record.nbytes for record in measured.experts.values())
    assert document["experts_nbytes"] == measured.experts_nbytes
    assert document["experts_bits_per_weight"] == measured.experts_nbytes * 8 / (8 * N_WEIGHTS)
    assert document["experts"]["layers.1.experts.2"] == {
        "nbytes": measured.experts[ExpertKey(1, 2)].nbytes,
        "schemes": ["2bit-g16"] * 3,
        "weight_errors": [0.3, 0.3, 0.2],
    }
    assert document["dense"]["norm"]["weight_errors"] == [0.0]
    assert document["dense"]["embed_tokens"]["weight_errors"] is None


def test_as_json_a_layer_has_its_schemes_and_errors(measured: Manifest) -> None:
    first, second = inspect_json(measured)["layers"]  # type: ignore[misc]

    assert first["schemes"] == {"4bit-g64": 4}  # type: ignore[has-type]
    assert second["schemes"] == {"4bit-g64": 3, "2bit-g16": 1}  # type: ignore[has-type]
    assert second["weight_errors"]["w1"] == pytest.approx(((3 * 0.08**2 + 0.3**2) / 4) ** 0.5)  # type: ignore[has-type]
    assert second["attention_weight_error"] is None  # type: ignore[has-type]
