from dataclasses import dataclass

from expertd.progress import ConversionLines


@dataclass(frozen=True, slots=True)
class At:
    done_nbytes: int
    total_nbytes: int = 10_000_000_000
    fetched_nbytes: int = 0
    to_fetch_nbytes: int = 0


def test_a_log_gets_a_line_a_minute() -> None:
    lines = ConversionLines()

    told = [lines.line(At(0), now=now) is not None for now in (5.0, 30.0, 66.0, 70.0, 125.9, 126.0)]

    assert told == [False, False, True, False, False, True]


def test_the_time_left_is_what_the_rest_takes_at_this_runs_pace() -> None:
    lines = ConversionLines()
    lines.line(At(4_000_000_000), now=0.0)

    line = lines.line(At(5_000_000_000), now=120.0)

    assert line == "5.0 of 10.0 GB quantized, about 10 min left"


def test_what_has_to_be_fetched_is_told_of_and_without_progress_no_time_is_promised() -> None:
    lines = ConversionLines()
    lines.line(At(0), now=0.0)

    line = lines.line(At(0, fetched_nbytes=2_500_000_000, to_fetch_nbytes=93_000_000_000), now=61.0)

    assert line == "0.0 of 10.0 GB quantized, 2.5 of 93.0 GB fetched"
