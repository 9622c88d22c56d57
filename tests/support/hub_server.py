"""A local server that speaks as much of the Hub's API as a download takes, and can misbehave on request.

    GET  /api/models/OWNER/NAME[/revision/REV]   the commit and its files with sizes and checksums
    HEAD, GET /OWNER/NAME/resolve/REV/FILE       small files themselves; large ones redirect to the other host
    GET  /cdn/FILE (on the second port)          bytes, ranges too, and nobody's token

It listens on two ports of the loopback, so that the redirect leads to another origin, as on the real Hub.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = "someone/tiny-mixtral"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE_SUFFIX = ".safetensors"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)\Z")


@dataclass(slots=True)
class Faults:
    """What the server does wrong, each until it is used up or for good."""

    cut_after: list[int] = field(
        default_factory=list
    )  # each of these that reaches a file's end is cut after so many bytes
    statuses: list[int] = field(default_factory=list)  # each response of the other host is this instead
    ignores_ranges: bool = False
    damages: int = 0  # so many responses of the other host that reach a file's end have a wrong byte
    needs_token: str | None = None
    stalls_after: int | None = None  # such a response stops after so many bytes, until it may go on
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class HubServer:
    """A running server. `requests` are (method, path, range, token) in the order in which they came."""

    folder: Path
    endpoint: str
    faults: Faults
    requests: list[tuple[str, str, str | None, str | None]]

    def sent_of(self, name: str) -> list[str | None]:
        """Return the ranges that were asked of the other host for that file."""
        return [range_ for _, path, range_, _ in self.requests if path == f"/cdn/{name}"]


def environment(server: HubServer, cache: Path) -> dict[str, str]:
    """Return the environment of a process for which that server is the Hub."""
    return dict(os.environ) | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(cache)}


@contextmanager
def hub_server(folder: Path) -> Iterator[HubServer]:
    """Serve the folder as the repository REPO."""
    faults = Faults()
    requests: list[tuple[str, str, str | None, str | None]] = []
    cdn = ThreadingHTTPServer(("127.0.0.1", 0), type("Cdn", (_Cdn,), {}))
    hub = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHost", (_HubHost,), {}))
    for server in (cdn, hub):
        server.daemon_threads = True
        server.context = _Context(folder, faults, requests, f"http://127.0.0.1:{cdn.server_port}")  # type: ignore[attr-defined]
    threads = [threading.Thread(target=server.serve_forever) for server in (cdn, hub)]
    for thread in threads:
        thread.start()
    try:
        yield HubServer(folder, f"http://127.0.0.1:{hub.server_port}", faults, requests)
    finally:
        faults.go_on.set()
        for server, thread in zip((cdn, hub), threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


@dataclass(frozen=True, slots=True)
class _Context:
    folder: Path
    faults: Faults
    requests: list[tuple[str, str, str | None, str | None]]
    cdn: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def context(self) -> _Context:
        context: _Context = self.server.context  # type: ignore[attr-defined]
        return context

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def note(self) -> None:
        """Take the request down."""
        self.context.requests.append(
            (self.command, self.path.split("?")[0], self.headers.get("Range"), self.headers.get("Authorization"))
        )

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _HubHost(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.note()
        token = self.context.faults.needs_token
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            self.answer(401, X_Error_Code="GatedRepo")
        elif self.path.startswith(f"/api/models/{REPO}"):
            self._list(self.path.split("?")[0].removeprefix(f"/api/models/{REPO}"))
        elif match := re.match(rf"/{REPO}/resolve/([^/]+)/([^/?]+)\Z", self.path.split("?")[0]):
            self._resolve(match[1], match[2])
        else:
            self.answer(404, X_Error_Code="RepoNotFound")

    def _list(self, rest: str) -> None:
        if rest not in {"", "/revision/main", f"/revision/{COMMIT}"}:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        files = []
        for path in sorted(self.context.folder.iterdir()):
            data = path.read_bytes()
            file: dict[str, object] = {"rfilename": path.name, "size": len(data), "blobId": _git_sha1(data)}
            if path.name.endswith(_LARGE_SUFFIX):
                file["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            files.append(file)
        body = json.dumps({"id": REPO, "sha": COMMIT, "siblings": files}).encode()
        self.answer(200, body, Content_Type="application/json")

    def _resolve(self, revision: str, name: str) -> None:
        path = self.context.folder / name
        if revision not in {"main", COMMIT} or not path.is_file():
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        data = path.read_bytes()
        if not name.endswith(_LARGE_SUFFIX):
            self.answer(200, data, X_Repo_Commit=COMMIT, ETag=f'"{_git_sha1(data)}"')
            return
        self.answer(
            302,
            Location=f"{self.context.cdn}/cdn/{name}",
            X_Repo_Commit=COMMIT,
            X_Linked_Size=str(len(data)),
            X_Linked_Etag=f'"{hashlib.sha256(data).hexdigest()}"',
        )


class _Cdn(_Handler):
    def do_GET(self) -> None:
        self.note()
        faults = self.context.faults
        if faults.statuses:
            self.answer(faults.statuses.pop(0))
            return
        data = (self.context.folder / self.path.removeprefix("/cdn/")).read_bytes()
        total = len(data)
        match = _RANGE.match(self.headers.get("Range", ""))
        begin, end = 0, total
        if match and not faults.ignores_ranges:
            begin, end = int(match[1]), min(int(match[2]) + 1 if match[2] else total, total)
        body = bytearray(data[begin:end])
        if faults.damages and end == total:
            faults.damages -= 1
            body[-1] ^= 1
        self.send_response(206 if match and not faults.ignores_ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        if match and not faults.ignores_ranges:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
        self.end_headers()
        self._send(body, is_whole=end == total)

    def _send(self, body: bytearray, *, is_whole: bool) -> None:
        faults = self.context.faults
        if is_whole and faults.cut_after:
            self.wfile.write(body[: faults.cut_after.pop(0)])
            self.close_connection = True
            return
        if is_whole and faults.stalls_after is not None:
            self.wfile.write(body[: faults.stalls_after])
            self.wfile.flush()
            faults.stalled.set()
            faults.go_on.wait()
            self.close_connection = True
            return
        self.wfile.write(body)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
