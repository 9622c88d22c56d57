import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import FaultPointUnknown
from protocol.fault_points import FaultPoint, arm, reached

ROOT = Path(__file__).parents[3]
POINT = FaultPoint.DAEMON_RECORD_READING


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm(None)


def outcomes(n_times: int) -> list[bool]:
    """Return whether each of so many passages failed."""
    failed = []
    for _ in range(n_times):
        try:
            reached(POINT)
        except OSError:
            failed.append(True)
        else:
            failed.append(False)
    return failed


@pytest.mark.parametrize("order", [None, "", "daemon-locked=fail"])
def test_a_point_that_is_not_armed_does_nothing(order: str | None) -> None:
    arm(order)

    assert outcomes(3) == [False, False, False]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("daemon-record-reading=fail", [True, False, False, False]),
        ("daemon-record-reading=fail@3", [False, False, True, False]),
        ("daemon-record-reading=fail@2+", [False, True, True, True]),
    ],
)
def test_a_point_fails_at_the_passage_that_was_ordered(order: str, expected: list[bool]) -> None:
    arm(order)

    assert outcomes(4) == expected


def test_arming_again_counts_anew() -> None:
    arm("daemon-record-reading=fail@2")
    reached(POINT)
    arm("daemon-record-reading=fail@2")

    assert outcomes(2) == [False, True]


@pytest.mark.parametrize("order", ["x", "x=kill", "daemon-locked=", "daemon-locked=kill@-1", " daemon-locked=kill"])
def test_an_order_that_names_no_point_is_refused(order: str) -> None:
    with pytest.raises(FaultPointUnknown, match="EXPERTD_FAULT_POINT"):
        arm(order)


def test_every_point_stands_at_one_place_of_the_product() -> None:
    sources = [path for package in ("protocol", "expertd", "runner") for path in (ROOT / package).rglob("*.py")]

    placed = Counter(name for path in sources for name in re.findall(r"reached\(FaultPoint\.(\w+)\)", path.read_text()))

    assert placed == Counter(point.name for point in FaultPoint)
