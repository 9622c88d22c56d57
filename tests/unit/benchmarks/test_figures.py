import pytest

from benchmarks.figures import Figure, ratios, table


def test_a_figure_is_summed_up_by_its_median_and_its_range() -> None:
    figure = Figure("decode", "tok/s", (3.0, 1.0, 2.5))

    assert figure.as_json() == {
        "name": "decode", "unit": "tok/s", "samples": (3.0, 1.0, 2.5), "median": 2.5, "least": 1.0, "greatest": 3.0,
    }  # fmt: skip


def test_the_table_has_a_line_a_figure() -> None:
    text = table([Figure("decode", "tok/s", (3.0, 1.0, 2.0)), Figure("load", "s", (0.5,))])

    assert text.splitlines()[2:] == ["| decode | 2 | 1 | 3 | tok/s | 3 |", "| load | 0.5 | 0.5 | 0.5 | s | 1 |"]


def test_ratios_pair_what_was_measured_in_one_round() -> None:
    assert ratios([1.0, 6.0], [2.0, 3.0]) == (0.5, 2.0)


def test_rounds_of_different_number_have_no_ratios() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0, 2.0], [1.0])
