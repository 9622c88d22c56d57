"""Whether segments that somebody else held are the store they are said to be: proven byte for byte, never believed.

Blocks the thread that calls it: 0.1 processor seconds a GB. Reads no file of the store. Whoever held the descriptors,
a daemon before this one, a runner, the service manager, may have been wrong or lied; seals say that nothing changes
any more, checksums that it is what the manifest promises, the manifest's digest that it is that manifest.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from expertd.errors import LoadCancelled, StoreInvalid
from expertd.loader import LoadedStore, SealedPart
from expertd.store import is_intact
from protocol.catalogue import CATALOGUE_NBYTES_MAX, Catalogue, decode_catalogue
from protocol.errors import ProtocolError
from protocol.fault_points import FaultPoint, reached
from protocol.fdpass import close_all
from protocol.handles import DenseHandle, ExpertHandle, ExpertKey
from protocol.manifest import Record
from protocol.segment import map_segment, segment_nbytes

logger = logging.getLogger(__name__)

_BLOCK_NBYTES = 512  # the unit of st_blocks, whatever the file system's own is


def adopt(
    fds: list[int],
    digest: str,
    *,
    n_threads: int,
    may_lack_experts: bool = False,
    is_wanted: Callable[[], bool] = lambda: True,
) -> LoadedStore | SealedPart:
    """Return the store that those descriptors hold, catalogue first; raise StoreInvalid or LoadCancelled.

    Of a store with slots that is its sealed part: nobody but who made slots can fill them, and their descriptors may be
    left out. All descriptors are owned from here on, and closed on failure. `may_lack_experts`: a catalogue without
    slots may leave out experts as corrupt; only who cannot gain from hiding some may say so.
    """
    start = time.monotonic()
    try:
        catalogue = _read_catalogue(fds, digest)
        missing = _missing_experts(catalogue, may_lack_experts=may_lack_experts)
        _check_all(catalogue, fds[1:], n_threads, is_wanted)
        reached(FaultPoint.DAEMON_OFFER_PROVEN)
    except ProtocolError as error:
        close_all(fds)
        raise StoreInvalid(str(error)) from None
    except BaseException:
        close_all(fds)
        raise
    if catalogue.slots is not None:
        close_all(fds[:1])
        return SealedPart(catalogue, fds[1:])
    return LoadedStore(
        catalogue=catalogue,
        digest=digest,
        nbytes=sum(catalogue.segments_nbytes),
        load_s=time.monotonic() - start,
        huge_nbytes=0,
        corrupt=missing,
        fds=fds,
    )


def _read_catalogue(fds: list[int], digest: str) -> Catalogue:
    """Return what the first descriptor says the others hold; raise StoreInvalid or ProtocolError."""
    if not fds:
        raise StoreInvalid("no descriptors came")
    nbytes = segment_nbytes(fds[0])
    if not 0 < nbytes <= CATALOGUE_NBYTES_MAX:
        raise StoreInvalid(f"the catalogue has {nbytes} bytes, 1 to {CATALOGUE_NBYTES_MAX} were expected")
    catalogue = decode_catalogue(bytes(_mapped(fds[0], nbytes)))
    if catalogue.manifest.digest != digest:
        raise StoreInvalid(f"the catalogue is of store {catalogue.manifest.digest[:12]}, not {digest[:12]}")
    n_fds = 1 + catalogue.n_sealed
    if len(fds) == 1 + len(catalogue.segments_nbytes):  # those of slots came along
        close_all(fds[n_fds:])
        del fds[n_fds:]
    if len(fds) != n_fds:
        raise StoreInvalid(f"{n_fds - 1} segments were promised, {len(fds) - 1} came")
    manifest = catalogue.manifest
    if sum(catalogue.segments_nbytes[: catalogue.n_sealed]) > manifest.dense_nbytes + manifest.experts_nbytes:
        raise StoreInvalid("the segments are larger than what they hold")
    return catalogue


def _missing_experts(catalogue: Catalogue, *, may_lack_experts: bool) -> tuple[ExpertKey, ...]:
    """Return the experts that have no place; raise StoreInvalid unless there may be some."""
    if catalogue.slots is not None:
        return ()  # what has no place there is read into slots
    missing = tuple(sorted(catalogue.manifest.experts.keys() - catalogue.experts.keys()))
    if missing and not may_lack_experts:
        raise StoreInvalid(f"{len(missing)} experts are missing")
    return missing


def _mapped(fd: int, nbytes: int) -> memoryview:
    """Map a segment whose memory is all there already: reading a hole would take memory nobody has counted."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        raise StoreInvalid("a descriptor is not read-only")
    view = map_segment(fd, nbytes)
    if os.fstat(fd).st_blocks * _BLOCK_NBYTES < nbytes:
        raise StoreInvalid("a segment has holes")
    return view


def _check_all(catalogue: Catalogue, fds: list[int], n_threads: int, is_wanted: Callable[[], bool]) -> None:
    """Raise StoreInvalid unless every record's bytes match its checksum; one segment is mapped at a time."""
    manifest = catalogue.manifest
    placed: list[tuple[str, Record, ExpertHandle | DenseHandle]] = [
        *((name, manifest.dense[name], handle) for name, handle in catalogue.dense.items()),
        *((str(key), manifest.experts[key], handle) for key, handle in catalogue.experts.items()),
    ]
    with ThreadPoolExecutor(n_threads, "expertd-adopt") as pool:
        for segment, (fd, nbytes) in enumerate(zip(fds, catalogue.segments_nbytes[: catalogue.n_sealed], strict=True)):
            view = _mapped(fd, nbytes)

            def check(place: tuple[str, Record, ExpertHandle | DenseHandle], view: memoryview = view) -> bool:
                if not is_wanted():
                    raise LoadCancelled("the store is no longer wanted")
                _name, record, handle = place
                return is_intact(record, view[handle.offset : handle.offset + handle.nbytes])

            here = [place for place in placed if place[2].segment == segment]
            for (name, _record, _handle), is_right in zip(here, pool.map(check, here), strict=True):
                if not is_right:
                    raise StoreInvalid(f"{name}: its checksum is wrong")
