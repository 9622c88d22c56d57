"""A GPU made ready for a model: its context, its products, and how the store's records reach it. Thin; decides little.

Nothing large is taken here. The kernels are compiled, so that nobody waits for them later, and what the context takes
with them is measured. Whether the store's sealed mapping can be page-locked is found by trying, if the user wants that;
otherwise, and where it is refused, records go through staging chunks, and it is said what that loses.
"""

import logging
import os
from contextlib import ExitStack

import torch
from torch import Tensor

from protocol.handles import ExpertKey
from quant.triton_kernels import open_products
from runner.config import PIN_DIRECT
from runner.devices.cuda import CudaDevice
from runner.devices.cuda_memory import Nvml, context_nbytes
from runner.devices.cuda_registration import HostRange, LibCuda, Refused, contiguous_ranges, register
from runner.devices.cuda_runtime import TorchRuntime
from runner.devices.device import Device
from runner.errors import CorruptExpert, DeviceUnavailable
from runner.experts.staging import Stager, measure_staging
from runner.experts.transfer import CHUNK_NBYTES
from runner.models.computation import Computation
from runner.models.opening_device import OnDevice
from runner.store_view import StoreView

_log = logging.getLogger(__name__)

_N_STAGERS_MAX = 4
_LOST_SHARE_MIN = 0.1


def open_cuda(computation: Computation, owned: ExitStack) -> OnDevice:
    """Return the GPU that the computation names, ready; what has to be closed is entered into `owned`."""
    index = int(computation.device.partition(":")[2])
    nvml = Nvml()
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    used_before = nvml.used_nbytes(uuid)
    device = CudaDevice(TorchRuntime(index))
    owned.callback(device.close)
    with device.computing(), device.reporting("compiling kernels"):
        products = open_products(
            device.torch_device,
            torch.float32 if computation.settings.exact else torch.float16,
            schemes=_dense_schemes(computation.store),
            experts=_expert_schemes(computation.store),
        )
        device.drain()
        taken_by_torch = torch.cuda.memory_reserved(index)
        free_nbytes = torch.cuda.mem_get_info(index)[0] + taken_by_torch
    is_direct = computation.settings.pin == PIN_DIRECT and _is_page_locked(computation.store, owned)
    n_stagers = max(1, min(_N_STAGERS_MAX, (os.cpu_count() or 1) // 2))
    if not is_direct:
        say_what_staging_loses(device, n_stagers, _any_record(computation.store))
    return OnDevice(
        device,
        products,
        is_direct=is_direct,
        context_nbytes=context_nbytes(used_before, nvml.used_nbytes(uuid), taken_by_torch),
        free_nbytes=free_nbytes,
        n_stagers=n_stagers,
    )


def say_what_staging_loses(device: Device, n_stagers: int, record: Tensor | None) -> None:
    """Measure how fast staging chunks are filled beside what the link takes; warn if that is a loss."""
    if record is None:
        return
    stager = Stager(n_stagers)
    try:
        speed = measure_staging(device, stager, record, CHUNK_NBYTES)
    finally:
        stager.close()
    if speed.lost_share >= _LOST_SHARE_MIN:
        _log.warning(
            "experts are staged at %.1f GB/s by %d threads, the link takes %.1f GB/s: with --pin direct the device may "
            "read the store's memory by itself",
            speed.fill_bytes_per_s / 1e9,
            n_stagers,
            speed.link_bytes_per_s / 1e9,
        )


def _is_page_locked(store: StoreView, owned: ExitStack) -> bool:
    """Page-lock all records, until `owned` is closed; return False, with a warning, if that is refused."""
    try:
        outcome = register(LibCuda(), contiguous_ranges(_ranges(store)), is_read_only=True)
    except DeviceUnavailable as error:
        outcome = Refused(str(error))
    if isinstance(outcome, Refused):
        _log.warning("--pin direct: the store's memory cannot be page-locked (%s); it is staged", outcome.reason)
        return False
    # Closed behind the cache, which is opened later and drains the device.
    owned.enter_context(outcome)
    return True


def _ranges(store: StoreView) -> list[HostRange]:
    records = (_record(store, key) for key in store.manifest.experts)
    return [HostRange(record.data_ptr(), record.numel()) for record in records if record is not None]


def _any_record(store: StoreView) -> Tensor | None:
    records = (_record(store, key) for key in store.manifest.experts)
    return next((record for record in records if record is not None), None)


def _record(store: StoreView, key: ExpertKey) -> Tensor | None:
    try:
        return torch.frombuffer(store.expert_record(key), dtype=torch.uint8)
    except CorruptExpert:
        return None  # it is an error when it is chosen


def _dense_schemes(store: StoreView) -> set[str]:
    return {part.scheme for record in store.manifest.dense.values() for part in record.parts}


def _expert_schemes(store: StoreView) -> set[tuple[str, str, str]]:
    """Return the schemes of gate, up and down that experts have together."""
    schemes = [{part.name: part.scheme for part in record.parts} for record in store.manifest.experts.values()]
    return {(of_parts["w1"], of_parts["w3"], of_parts["w2"]) for of_parts in schemes}
