"""All checks, in the order in which they are printed. Blocks its caller for a few seconds at most."""

import os
import platform
import resource
from collections.abc import Sequence
from pathlib import Path

from expertd.budget import least_nbytes
from expertd.cgroup import memory_groups
from expertd.config import config_file
from expertd.doctor import daemon, disk_speed, memory, place, processor, readings
from expertd.doctor.disk_speed import FilePart
from expertd.doctor.findings import Finding, ok, problem
from expertd.doctor.memory import MachineMemory, StoreNeed
from expertd.errors import StoreInvalid
from expertd.server import LIBZMQ_LOWEST, libzmq_version
from expertd.store import StoreFiles
from protocol.control_client import ControlClient
from protocol.errors import DaemonUnavailable, ProtocolError
from protocol.manifest import Manifest
from protocol.messages import GetStatus, Status, StoreState
from protocol.runtime_dir import RuntimeDir
from protocol.version import LIBRARY_VERSION


def examine(directory: RuntimeDir, store: Path | None) -> list[Finding]:
    """Return what limits expertd on this machine, and the store in that directory."""
    running = _running(directory)
    manifest = _manifest(store) if store is not None else None
    ready = running.ready if isinstance(running, daemon.Running) else ()
    is_held = isinstance(manifest, Manifest) and manifest.digest in ready
    need = _need(manifest) if isinstance(manifest, Manifest) and not is_held else None
    findings = [
        *_of_the_daemon(directory, running),
        *_of_memory(need),
        processor.check_kernels(
            processor.cpu_flags(readings.text_of("/proc/cpuinfo") or ""), has_library=readings.has_c_library()
        ),
        processor.check_numa(readings.text_of("/sys/devices/system/node/online")),
        processor.check_gpu(readings.gpus()),
    ]
    if store is not None and manifest is not None:
        findings += _of_the_store(store, manifest, is_held=is_held)
    return findings


def _of_the_daemon(
    directory: RuntimeDir, running: daemon.Running | daemon.NotRunning | daemon.NotUsable
) -> Sequence[Finding]:
    reason = readings.runtime_dir_problem(directory)
    vanishes = readings.vanishes_at_logout(directory, os.geteuid())
    return [
        ok("kernel", f"Linux {platform.release()}"),
        daemon.check_settings(config_file(), readings.settings_problem(), is_there=config_file().exists()),
        daemon.check_runtime_dir(directory.path, reason, vanishes=vanishes),
        *([] if reason is not None else [daemon.check_running(running, LIBRARY_VERSION)]),
        daemon.check_seals(readings.broken_seal()),
        daemon.check_libzmq(libzmq_version(), LIBZMQ_LOWEST),
        daemon.check_descriptors(readings.hard_limit(resource.RLIMIT_NOFILE)),
    ]


def _of_memory(need: StoreNeed | None) -> Sequence[Finding]:
    machine, groups = _machine_memory(), memory_groups()
    shmem_setting = readings.text_of("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return [
        memory.check_available(machine, groups, need),
        memory.check_group(machine, groups),
        memory.check_swap(machine),
        memory.check_locked(readings.hard_limit(resource.RLIMIT_MEMLOCK), machine),
        memory.check_overcommit(readings.number_of("/proc/sys/vm/overcommit_memory", 0), machine, need),
        memory.check_oom(readings.number_of("/proc/self/oom_score_adj", 0)),
        memory.check_huge_pages(memory.chosen_setting(shmem_setting or ""), readings.huge_nbytes()),
    ]


def _of_the_store(store: Path, manifest: Manifest | StoreInvalid, *, is_held: bool) -> Sequence[Finding]:
    if isinstance(manifest, StoreInvalid):
        return [problem("store", str(manifest), "name the directory of a store; `expertd verify` checks its content")]
    resolved = store.resolve()
    parts = [FilePart(resolved / r.file, r.offset, r.nbytes) for r in manifest.experts.values()]
    token_nbytes = manifest.model.n_layers * manifest.model.top_k * _largest_nbytes(manifest)
    size = f"{_nbytes(manifest) / 1e9:.2f} GB, digest {manifest.digest[:12]}"
    return [
        ok("store", f"{size}, in memory already" if is_held else size),
        place.check_file_system(place.file_system_of(resolved, readings.text_of("/proc/self/mountinfo") or "")),
        *place.check_disk(disk_speed.measure(parts), _nbytes(manifest), token_nbytes),
    ]


def _running(directory: RuntimeDir) -> daemon.Running | daemon.NotRunning | daemon.NotUsable:
    try:
        with ControlClient(directory) as client:
            status = client.ask(GetStatus(), Status)
    except DaemonUnavailable as error:
        if not _is_locked(directory):
            return daemon.NotRunning()
        return daemon.NotUsable(f"one holds {directory.lock} and does not answer: {error}")
    except ProtocolError as error:
        return daemon.NotUsable(str(error))
    ready = tuple(store.digest for store in status.stores if store.state is StoreState.READY)
    return daemon.Running(status.pid, status.library_version, ready)


def _is_locked(directory: RuntimeDir) -> bool:
    """Whether a daemon holds the lock. Trying it would turn away one that is just starting."""
    try:
        found = directory.lock.lstat()
    except OSError:
        return False
    return daemon.is_locked(readings.text_of("/proc/locks") or "", found.st_dev, found.st_ino)


def _manifest(store: Path) -> Manifest | StoreInvalid:
    try:
        with StoreFiles(store) as files:
            return files.manifest
    except StoreInvalid as error:
        return error


def _machine_memory() -> MachineMemory:
    return memory.parse_meminfo(readings.text_of("/proc/meminfo") or "")


def _need(manifest: Manifest) -> StoreNeed:
    return StoreNeed(_nbytes(manifest), min(least_nbytes(manifest), _nbytes(manifest)))


def _nbytes(manifest: Manifest) -> int:
    return manifest.dense_nbytes + manifest.experts_nbytes


def _largest_nbytes(manifest: Manifest) -> int:
    return max(record.nbytes for record in manifest.experts.values())
