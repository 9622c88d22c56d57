"""What the steps measure, on the stand-in accelerator: its link's speed is known, so that the figures can be wrong."""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch

from benchmarks.gpu.copies import copy_speeds, overlap
from benchmarks.gpu.costs import call_costs
from benchmarks.gpu.figures import MIB, Busy
from benchmarks.gpu.kernels import part_figures
from benchmarks.gpu.latency import demand_ms
from benchmarks.gpu.registration import measure_mode, reader
from benchmarks.gpu.tokens import compared, computed, on_device
from quant.torch_products import TorchProducts
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.engine import Engine
from tests.support.device_models import engine_on, link
from tests.support.small_stores import SmallStore, make_small_store
from tests.unit.runner.devices.test_cuda_registration import FakeDriver

GB_PER_S = 0.5
CPU = torch.device("cpu")


@pytest.fixture
def device() -> Iterator[LinkDevice]:
    device = LinkDevice(LinkSpeed(GB_PER_S * 1e9))
    yield device
    device.close()


def test_no_way_to_copy_is_faster_than_the_link(device: LinkDevice) -> None:
    speeds = copy_speeds(device, Busy(device, CPU, size=64), 1 * MIB, 8 * MIB)

    assert list(speeds) == ["pageable", "staged by 1", "staged by 2", "staged by 3", "staged by 4", "direct"]
    for way in speeds.values():
        assert 0 < way["idle"] <= GB_PER_S
        assert 0 < way["computing"] <= GB_PER_S


class Asleep(Busy):
    """Work that needs no core, and outlasts by far what it is to outlast: a busy machine changes nothing."""

    def launch(self, seconds: float) -> None:
        def work() -> None:
            threading.Event().wait(5 * seconds)

        self._device.launch(work)


def test_a_device_with_two_queues_is_seen_to_use_both_at_once(device: LinkDevice) -> None:
    figures = overlap(device, Asleep(device, CPU, size=64), 16 * MIB)

    assert figures["copies_were_done_before_the_work_that_was_submitted_first"] is True


def test_no_demand_is_met_faster_than_the_link_behind_a_prefetch_or_not(device: LinkDevice) -> None:
    figures = demand_ms(device, 8 * MIB, 1 * MIB)

    assert list(figures) == ["alone", "behind a prefetch"]
    assert all(ms >= 8 * MIB / GB_PER_S / 1e6 for ms in figures.values())


def test_calls_and_a_layers_wait_have_their_costs(device: LinkDevice) -> None:
    costs = call_costs(device, CPU)

    assert list(costs) == ["launch", "record", "wait", "layer_wait"]
    assert all(cost > 0 for cost in costs.values())


def test_products_that_round_to_16_bits_are_off_by_as_much() -> None:
    figures = part_figures(TorchProducts(CPU, torch.float16), "4bit-g64", (256, 128), lambda: None, n_repeats=2)

    errors, speeds = figures["error"], figures["gb_per_s"]
    assert isinstance(errors, dict)
    assert isinstance(speeds, dict)
    assert list(errors) == list(speeds) == [1, 2, 4, 8, 16, 32, 64, 128]
    # The activations are given in 16 bits to both, and torch computes in fp32: there is nothing to differ by.
    assert max(errors.values()) < 1e-6
    assert figures["repeats_that_differ"] == 0


@pytest.mark.parametrize("mode", ["sealed read-only", "writable", "collapsed"])
def test_every_kind_of_memory_is_registered_as_what_it_is(device: LinkDevice, mode: str) -> None:
    flags: list[int] = []

    class Noting(FakeDriver):
        def register(self, address: int, nbytes: int, flag: int) -> int:
            flags.append(flag)
            return super().register(address, nbytes, flag)

    driver = Noting()

    figures = measure_mode(device, driver, mode, 4 * MIB)

    assert flags == [0x09 if mode == "sealed read-only" else 0x01]
    assert driver.registered == {}
    copied = figures["copy_gb_per_s"]
    assert isinstance(copied, float)
    assert 0 < copied <= GB_PER_S


def test_a_kind_of_memory_that_is_refused_is_reported_so(device: LinkDevice) -> None:
    assert measure_mode(device, FakeDriver(n_ranges_max=0), "writable", 4 * MIB)["refused"] == "CUDA_ERROR_2"


def test_a_reader_says_its_longest_pause() -> None:
    fd = os.memfd_create("read", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * MIB)

    with reader(fd, 4 * MIB) as longest_ms:
        pass
    os.close(fd)

    assert len(longest_ms) == 1
    assert longest_ms[0] > 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    return make_small_store(tmp_path_factory.mktemp("small"), n_experts=8, vocab=96)


def opened(store: SmallStore, k: int) -> AbstractContextManager[Engine]:
    return engine_on(store, link(), cache_experts=k, exact=False)


def test_tokens_are_found_to_be_equal_whatever_is_kept_and_near_the_cpus(store: SmallStore) -> None:
    with store.engine() as engine:
        on_cpu = computed(engine).logits
    reference = on_device(partial(opened, store), 8)

    figures = compared(on_device(partial(opened, store), 2), reference, on_cpu)

    assert figures["tokens_are_equal"] is True
    assert figures["logits_are_equal"] is True
    from_cpu = figures["from_cpu"]
    assert isinstance(from_cpu, dict)
    assert 0 < from_cpu["median"] < 5e-3


def test_a_logit_that_differs_in_one_bit_is_found(store: SmallStore) -> None:
    reference = on_device(partial(opened, store), 8)
    came = on_device(partial(opened, store), 8)
    came.logits[0, 0] = torch.nextafter(came.logits[0, 0], torch.tensor(torch.inf))

    assert compared(came, reference, reference.logits)["logits_are_equal"] is False
