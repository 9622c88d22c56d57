import pytest

from runner.devices.cuda_memory import CONTEXT_NBYTES_MAX, Nvml, context_nbytes

MIB = 1 << 20


def test_a_context_is_what_came_to_the_gpus_memory_beside_what_torch_took() -> None:
    assert context_nbytes(1000 * MIB, 1400 * MIB, 90 * MIB) == 310 * MIB


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, 1400 * MIB), (1000 * MIB, None), (1000 * MIB, 900 * MIB), (0, 10 * MIB), (0, 20_000 * MIB)],
)
def test_where_that_cannot_be_right_the_most_that_one_takes_is_counted(before: int | None, after: int | None) -> None:
    assert context_nbytes(before, after, 0) == CONTEXT_NBYTES_MAX


def test_without_the_drivers_library_nobody_tells() -> None:
    assert Nvml("libnonvml.so.1").used_nbytes("GPU-00000000-0000-0000-0000-000000000000") is None
