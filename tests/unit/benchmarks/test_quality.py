from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.quality import PLAIN, REFERENCE, TABLE, Widths, quality_table
from expertd.convert.config import load_config


def figures_of(widths: Widths, number: float) -> list[Figure]:
    """Return made-up figures that tell stores apart: `number` GB, ten times as much perplexity."""
    values = {
        "store": number,
        "perplexity": 10 * number,
        "KL divergence": number / 100,
        "same most probable token": 0.5,
    }
    return [Figure(f"{widths.name}: {what}", "", (value,)) for what, value in values.items()]


def all_figures() -> list[Figure]:
    figures = [Figure("reference: store", "GB", (9.0,)), Figure("reference: perplexity", "", (3.5,))]
    others = [widths for widths in (*TABLE, *PLAIN) if widths != REFERENCE]
    for number, widths in enumerate(others, start=1):
        figures += figures_of(widths, number)
    return figures


def test_the_table_has_attention_by_experts_with_the_reference_in_its_corner() -> None:
    lines = quality_table(all_figures()).splitlines()

    assert lines[0].endswith("| 16 bits | 4 bits | 3 bits | 2 bits |")
    assert lines[2] == "| 16 bits | 9.000 / 3.50 | 1.000 / 10.00 | 2.000 / 20.00 | 3.000 / 30.00 |"
    assert lines[5] == "| 2 bits | 12.000 / 120.00 | 13.000 / 130.00 | 14.000 / 140.00 | 15.000 / 150.00 |"


def test_below_it_plain_hqq_stands_beside_refined() -> None:
    lines = quality_table(all_figures()).splitlines()

    assert lines[-6:] == [
        "| 4 bits, plain HQQ | 16.000 | 0.16000 | 160.000 | 50.00% |",
        "| 4 bits, refined | 1.000 | 0.01000 | 10.000 | 50.00% |",
        "| 3 bits, plain HQQ | 17.000 | 0.17000 | 170.000 | 50.00% |",
        "| 3 bits, refined | 2.000 | 0.02000 | 20.000 | 50.00% |",
        "| 2 bits, plain HQQ | 18.000 | 0.18000 | 180.000 | 50.00% |",
        "| 2 bits, refined | 3.000 | 0.03000 | 30.000 | 50.00% |",
    ]


def test_every_configuration_is_one_that_the_converter_takes(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    for widths in (*TABLE, *PLAIN):
        path.write_text(widths.config)

        config = load_config(path)

        assert (config.head, config.refine) == ("16bit", widths.refine)
        assert config.experts.startswith(f"{widths.experts}bit")
        assert config.attention.startswith(f"{widths.attention}bit")
