"""Engines whose whole model is computed on a device, which here is the stand-in accelerator over the host's memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from quant.torch_products import TorchProducts
from runner.config import RunnerConfig
from runner.devices.device import Buffer, Device
from runner.devices.link import LinkDevice
from runner.devices.link_speed import LinkSpeed
from runner.devices.link_stepped import RandomScheduler
from runner.engine import Engine
from runner.experts.cache import CacheMode
from runner.models.opening import CachePlan
from runner.models.opening_device import OnDevice
from tests.support.local_store import LocalStore
from tests.support.small_stores import SmallStore

FREE_NBYTES = 1 << 34


class OneThreaded(LinkDevice):
    """A device whose work is computed by one thread, whichever it is: the bits of torch's products depend on how many.

    How many threads torch takes for its sums is each thread's own.
    """

    def launch(
        self,
        work: Callable[[], None],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
        is_awaited: bool = False,
    ) -> None:
        def alone() -> None:
            torch.set_num_threads(1)
            work()

        super().launch(alone, reads=reads, writes=writes, is_awaited=is_awaited)


def link(seed: int | None = None) -> LinkDevice:
    """Return a strict device: with threads, or with a seed in the order that it says."""
    scheduler = None if seed is None else RandomScheduler(seed)
    return OneThreaded(LinkSpeed(1e12), strict=True, scheduler=scheduler)


@contextmanager
def engine_on(
    store: SmallStore | LocalStore,
    device: Device,
    *,
    is_direct: bool = False,
    free_nbytes: int = FREE_NBYTES,
    mode: CacheMode = CacheMode.CACHED,
    **options: Any,  # noqa: ANN401  # RunnerConfig's, which checks them
) -> Iterator[Engine]:
    """Yield an engine that computes on the device, by torch, in fp32 with `exact` and else in fp16."""
    defaults: dict[str, Any] = {"device": "link:1GB/s", "threads": 1, "context": 256, "exact": True}
    settings = RunnerConfig(**(defaults | options))
    products = TorchProducts(torch.device("cpu"), torch.float32 if settings.exact else torch.float16)
    on_device = OnDevice(device, products, is_direct=is_direct, context_nbytes=1000, free_nbytes=free_nbytes)
    plan = CachePlan(mode=mode, is_guarded=False, on_device=on_device)
    view = LocalStore(store.path) if isinstance(store, SmallStore) else store
    with Engine(view, settings, cache_plan=plan) as engine:
        yield engine
    device.close()
