"""Columns line up; where there is no room the least dear ones go, then words are cut in front."""

from expertd.tables import Column, table

COLUMNS = (Column("name", 9, is_words=True), Column("hits", 1), Column("read", 5))
ROWS = [["/models/mixtral-8x7b", "7", "1.5 GB"], ["/m/b", "12345", "20.0 GB"]]


def test_words_stand_left_and_numbers_right() -> None:
    assert table(COLUMNS, ROWS) == [
        "name                   hits     read",
        "/models/mixtral-8x7b      7   1.5 GB",
        "/m/b                  12345  20.0 GB",
    ]


def test_words_are_cut_in_front_before_a_column_goes() -> None:
    assert table(COLUMNS, ROWS, width=30) == [
        "name             hits     read",
        "…/mixtral-8x7b      7   1.5 GB",
        "/m/b            12345  20.0 GB",
    ]


def test_the_least_dear_column_goes_first() -> None:
    narrow, narrowest = table(COLUMNS, ROWS, width=24), table(COLUMNS, ROWS, width=15)

    assert narrow[0].split() == ["name", "read"]
    assert narrowest[0].split() == ["name"]


def test_no_line_is_longer_than_the_width_however_narrow() -> None:
    for width in range(1, 60):
        assert all(len(line) <= width for line in table(COLUMNS, ROWS, width))


def test_without_rows_the_titles_remain() -> None:
    assert table(COLUMNS, []) == ["name  hits  read"]
