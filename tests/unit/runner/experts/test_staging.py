from collections.abc import Iterator

import pytest
import torch

from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.experts.staging import Stager, StagingSpeed, measure_staging

MIB = 1 << 20


@pytest.fixture(params=[1, 2, 3, 4])
def stager(request: pytest.FixtureRequest) -> Iterator[Stager]:
    stager = Stager(request.param)
    yield stager
    stager.close()


@pytest.mark.parametrize("nbytes", [1, 4096, MIB - 1, 2 * MIB, 3 * MIB + 1, 8 * MIB])
def test_every_byte_is_copied_and_none_beyond_by_any_number_of_threads(stager: Stager, nbytes: int) -> None:
    source = torch.randint(0, 256, (9 * MIB,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(9 * MIB, dtype=torch.uint8)

    stager.copy(target, source, 777, nbytes)

    assert torch.equal(target[:nbytes], source[777 : 777 + nbytes])
    assert not target[nbytes:].any()


def test_the_measured_link_is_the_one_there_is() -> None:
    device = LinkDevice(LinkSpeed(0.5e9), strict=True)
    stager = Stager(1)

    speed = measure_staging(device, stager, torch.zeros(8 * MIB, dtype=torch.uint8), 4 * MIB)
    stager.close()
    device.close()

    # A copy takes no less than the link's time; how much more, the machine decides.
    assert 0.05e9 < speed.link_bytes_per_s <= 0.5e9
    assert speed.fill_bytes_per_s > 0


def test_filling_that_keeps_up_with_the_link_loses_nothing() -> None:
    assert StagingSpeed(30e9, 25e9).lost_share == 0
    assert StagingSpeed(10e9, 25e9).lost_share == pytest.approx(0.6)
