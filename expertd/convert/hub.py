"""The Hugging Face Hub: what a repository holds, and its bytes. The only module that imports huggingface_hub.

Bytes come by range requests that are taken up again where a connection broke: the package's own download begins anew
after a kill. Who we are, where the Hub is and where its cache lies the package reads itself: HF_TOKEN or `hf auth
login`, HF_ENDPOINT, HF_HOME. A redirect to another host is followed without the token.
"""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from expertd.convert.errors import FetchFailed, NotOnHub

_T = TypeVar("_T")

_TIMEOUT_S = 30.0
# How long to wait before each new attempt; bytes that came start the list again.
_WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-")
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_TOKEN_HINT = "give a token (HF_TOKEN, or `hf auth login`) and accept its conditions on its page"  # noqa: S105  # advice


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)


def _ignore(_line: str) -> None:
    """Say it to nobody."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository. `etag` is the sha256 of a large file, git's sha1 of a small one."""

    name: str
    nbytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Repository:
    """One state of a repository, by its commit; a name of a branch may mean another one tomorrow."""

    repo_id: str
    commit: str


@dataclass(frozen=True, slots=True)
class Hub:
    """A Hub; `endpoint` None is the one that the user's environment names.

    `say` is given a line when it has to be asked again.
    """

    endpoint: str | None = None
    wait: Callable[[float], None] = _wait
    say: Callable[[str], None] = _ignore

    def list_files(self, repo_id: str, revision: str | None) -> tuple[Repository, tuple[HubFile, ...]]:
        """Return what a branch, tag or commit (None: the main branch) holds now; raise NotOnHub or FetchFailed."""
        from huggingface_hub import HfApi

        def ask() -> tuple[Repository, tuple[HubFile, ...]]:
            info = HfApi(endpoint=self.endpoint, library_name="expertd").model_info(
                repo_id, revision=revision, timeout=_TIMEOUT_S, files_metadata=True
            )
            if info.sha is None or not _COMMIT.match(info.sha):
                raise NotOnHub(f"{repo_id}: the Hub names no commit; is HF_ENDPOINT a Hub?")
            files = []
            for file in info.siblings or []:
                etag = file.lfs.sha256 if file.lfs is not None else file.blob_id
                if file.size is not None and etag is not None:
                    files.append(HubFile(file.rfilename, file.size, etag))
            return Repository(repo_id, info.sha), tuple(files)

        return self._retried(repo_id, ask)

    def read(self, repository: Repository, name: str, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end` of a file; raise NotOnHub or FetchFailed."""
        data = bytearray()
        for offset, chunk in self.chunks(repository, name, begin, end):
            wanted = chunk[max(0, begin - offset) :]
            del data[max(0, offset - begin) :]
            data += wanted
        return bytes(data)

    def chunks(self, repository: Repository, name: str, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield offsets and bytes of a file from `begin` to `end`, over as many connections as it takes.

        Mostly an offset is where the bytes before ended; where a server answers with the whole file it is 0 again.
        Raise NotOnHub for what is not there or not ours to read, FetchFailed where nothing comes any more.
        """
        at, n_failed = begin, 0
        what = f"{repository.repo_id}: {name}"
        while at < end:
            brought_nothing = True
            try:
                for offset, chunk in self._one_connection(repository, name, at, end):
                    at, n_failed, brought_nothing = offset + len(chunk), 0, False
                    yield offset, chunk
                    if at >= end:
                        return
                reason = f"the connection ended at byte {at} of {end}"
            except _failures() as error:
                reason = _reason(what, error)
            if n_failed == len(_WAITS_S):
                raise FetchFailed(f"{what}: {reason}; tried {n_failed + 1} times")
            if brought_nothing:  # that long connections break is nothing to tell
                self._tell_again(what, reason, n_failed)
            self.wait(_WAITS_S[n_failed])
            n_failed += 1

    def cached(self, repository: Repository, file: HubFile) -> Path | None:
        """Return where the user's cache of the Hub has that file, None if it has not."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repository.repo_id, file.name, revision=repository.commit)
        if not isinstance(path, str):
            if not self.blob_path(repository, file).is_file():
                return None
            path = self.link(repository, file)
        return Path(path) if Path(path).stat().st_size == file.nbytes else None

    def blob_path(self, repository: Repository, file: HubFile) -> Path:
        """Return where that file's content belongs in the user's cache of the Hub."""
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        folder = repo_folder_name(repo_id=repository.repo_id, repo_type="model")
        return Path(HF_HUB_CACHE) / folder / "blobs" / file.etag

    def link(self, repository: Repository, file: HubFile) -> str:
        """Return the file's path in the cache, where its content is: other programs find it there too."""
        from huggingface_hub import hf_hub_download

        def ask() -> str:
            return hf_hub_download(
                repository.repo_id,
                file.name,
                revision=repository.commit,
                endpoint=self.endpoint,
                library_name="expertd",
            )

        return self._retried(repository.repo_id, ask)

    def _one_connection(self, repository: Repository, name: str, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not said to be exported, but documented
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        url = hf_hub_url(repository.repo_id, name, revision=repository.commit, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="expertd") | {
            "Accept-Encoding": "identity",
            "Range": f"bytes={begin}-{end - 1}",
        }
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=_TIMEOUT_S, retry_on_exceptions=(), retry_on_status_codes=()
        ) as response:
            hf_raise_for_status(response)
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            offset = int(match[1]) if match and response.status_code == 206 else 0
            if offset not in {0, begin}:
                raise OSError(f"bytes from {begin} were asked for, those from {offset} came")
            # As they come: what were gathered into longer pieces would be lost with the connection.
            for chunk in response.iter_bytes():
                wanted = chunk[: end - offset]
                yield offset, wanted
                offset += len(wanted)

    def _retried(self, what: str, ask: Callable[[], _T]) -> _T:
        for n_failed, wait_s in enumerate((*_WAITS_S, None)):
            try:
                return ask()
            except _failures() as error:
                reason = _reason(what, error)
            if wait_s is not None:
                self._tell_again(what, reason, n_failed)
                self.wait(wait_s)
        raise FetchFailed(f"{what}: {reason}; tried {len(_WAITS_S) + 1} times")

    def _tell_again(self, what: str, reason: str, n_failed: int) -> None:
        when = f"in {_WAITS_S[n_failed]:.0f} s" if _WAITS_S[n_failed] else "at once"
        self.say(f"{what}: {reason}; asking again {when} ({n_failed + 2} of {len(_WAITS_S) + 1})")


def _failures() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (HTTPError, OSError, ValueError)


def _reason(what: str, error: Exception) -> str:
    """Return why an attempt failed that may succeed next time; raise NotOnHub or FetchFailed for one that cannot."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    line = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status not in _TRANSIENT:
            raise NotOnHub(f"{what}: {_refusal(error, status)}") from None
        return f"the Hub answers with status {status}"
    if isinstance(error, OfflineModeIsEnabled):
        raise FetchFailed(f"{what}: HF_HUB_OFFLINE is set, and it is not on this machine") from None
    if isinstance(error, ValueError):
        raise NotOnHub(f"{what}: {line}") from None
    return f"the Hub cannot be reached ({line})"


def _refusal(error: Exception, status: int) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return f"no such folder, and no such repository on the Hub; if it is private, {_TOKEN_HINT}"
    if isinstance(error, GatedRepoError) or status in {401, 403}:
        return f"the Hub refuses it (status {status}); {_TOKEN_HINT}"
    return f"the Hub answers with status {status}"
