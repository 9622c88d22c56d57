"""How records reach a GPU, as far as that can be tried without one."""

from contextlib import ExitStack

import pytest
import torch

from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.models.opening_cuda import _is_page_locked, say_what_staging_loses
from tests.unit.runner.experts.tiny_store import TinyStore


def staging_warning(bytes_per_s: float, caplog: pytest.LogCaptureFixture) -> str:
    device = LinkDevice(LinkSpeed(bytes_per_s))
    say_what_staging_loses(device, 1, torch.zeros(4 << 20, dtype=torch.uint8))
    device.close()
    return caplog.text


def test_chunks_that_keep_up_with_a_slow_link_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    assert staging_warning(1e7, caplog) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which may page-lock the memory")
def test_a_machine_that_cannot_page_lock_the_store_says_so_and_stages(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as owned:
        assert not _is_page_locked(TinyStore(), owned)

    assert "--pin direct: the store's memory cannot be page-locked (the CUDA driver cannot be used" in caplog.text
