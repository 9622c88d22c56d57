"""Bytes from a Hub over connections that break: a local server that speaks its API stands for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd.convert.errors import FetchFailed, NotOnHub
from expertd.convert.hub import Hub, Repository
from tests.support.hub_server import COMMIT, REPO, HubServer, hub_server

DATA = bytes(range(256)) * 1000
REPOSITORY = Repository(REPO, COMMIT)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    (tmp_path / "model.safetensors").write_bytes(DATA)
    (tmp_path / "config.json").write_text("{}")
    with hub_server(tmp_path) as running:
        yield running


@pytest.fixture
def waited() -> list[float]:
    return []


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def hub(server: HubServer, waited: list[float], said: list[str]) -> Hub:
    return Hub(server.endpoint, wait=waited.append, say=said.append)


def fetch(hub: Hub, begin: int = 0) -> bytes:
    """Return the file as somebody writes it who puts each piece where it says it belongs."""
    data = bytearray(DATA[:begin])
    for offset, chunk in hub.chunks(REPOSITORY, "model.safetensors", begin, len(DATA)):
        data[offset : offset + len(chunk)] = chunk
    return bytes(data)


def test_a_repository_is_a_commit_and_its_files_with_sizes_and_checksums(hub: Hub) -> None:
    repository, files = hub.list_files(REPO, None)

    assert repository == REPOSITORY
    assert {file.name: (file.nbytes, len(file.etag)) for file in files} == {
        "config.json": (2, 40),
        "model.safetensors": (len(DATA), 64),
    }


def test_a_range_is_read_from_behind_a_redirect(hub: Hub, server: HubServer) -> None:
    assert hub.read(REPOSITORY, "model.safetensors", 1000, 1300) == DATA[1000:1300]
    assert server.sent_of("model.safetensors") == ["bytes=1000-1299"]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, server: HubServer, waited: list[float]) -> None:
    server.faults.cut_after = [100_000, 50_000]

    data = fetch(hub)

    assert data == DATA
    assert server.sent_of("model.safetensors") == [
        "bytes=0-255999",
        "bytes=100000-255999",
        "bytes=150000-255999",
    ]
    assert waited == [0.0, 0.0]


def test_a_server_that_knows_no_ranges_sends_the_whole_file_again(hub: Hub, server: HubServer) -> None:
    server.faults.ignores_ranges = True

    assert fetch(hub, begin=200_000) == DATA
    assert hub.read(REPOSITORY, "model.safetensors", 1000, 1300) == DATA[1000:1300]


def test_a_server_in_trouble_is_asked_again_and_again_after_longer_and_longer(
    hub: Hub, server: HubServer, waited: list[float]
) -> None:
    server.faults.statuses = [503, 429, 500]

    assert fetch(hub) == DATA
    assert waited == [0.0, 1.0, 2.0]


def test_every_new_attempt_is_told_with_its_reason(hub: Hub, server: HubServer, said: list[str]) -> None:
    server.faults.statuses = [503, 429, 500]

    fetch(hub)

    assert said == [
        f"{REPO}: model.safetensors: the Hub answers with status 503; asking again at once (2 of 7)",
        f"{REPO}: model.safetensors: the Hub answers with status 429; asking again in 1 s (3 of 7)",
        f"{REPO}: model.safetensors: the Hub answers with status 500; asking again in 2 s (4 of 7)",
    ]


def test_a_connection_that_broke_after_it_brought_bytes_is_nothing_to_tell(
    hub: Hub, server: HubServer, said: list[str]
) -> None:
    server.faults.cut_after = [100_000, 50_000]

    fetch(hub)

    assert said == []


def test_a_server_that_stays_in_trouble_is_given_up(hub: Hub, server: HubServer, waited: list[float]) -> None:
    server.faults.statuses = [503] * 100

    with pytest.raises(FetchFailed) as failure:
        fetch(hub)

    assert str(failure.value) == f"{REPO}: model.safetensors: the Hub answers with status 503; tried 7 times"
    assert sum(waited) == 31.0


def test_a_connection_that_never_brings_a_byte_is_given_up(hub: Hub, server: HubServer) -> None:
    server.faults.cut_after = [0] * 100

    with pytest.raises(FetchFailed, match="tried 7 times"):
        fetch(hub)


def test_a_status_that_will_not_change_is_not_asked_again(hub: Hub, server: HubServer, waited: list[float]) -> None:
    server.faults.statuses = [404]

    with pytest.raises(NotOnHub) as refusal:
        fetch(hub)

    assert str(refusal.value) == f"{REPO}: model.safetensors: the Hub answers with status 404"
    assert waited == []


def test_a_hub_that_is_not_there_is_said_to_be_out_of_reach_at_every_attempt(
    waited: list[float], said: list[str]
) -> None:
    hub = Hub("http://127.0.0.1:9", wait=waited.append, say=said.append)

    with pytest.raises(FetchFailed) as failure:
        hub.list_files(REPO, None)

    assert str(failure.value).startswith(f"{REPO}: the Hub cannot be reached (")
    assert "\n" not in str(failure.value)
    assert [line.rsplit("; ", 1)[1] for line in said] == [
        "asking again at once (2 of 7)",
        *(f"asking again in {2**n} s ({3 + n} of 7)" for n in range(5)),
    ]
    assert all(line.startswith(f"{REPO}: the Hub cannot be reached (") for line in said)


@pytest.mark.parametrize(
    ("repo_id", "revision", "expected"),
    [
        ("someone/else", None, "no such folder, and no such repository on the Hub; if it is private, give a token"),
        (REPO, "v9", "the repository has no such revision"),
    ],
)
def test_what_the_hub_has_not_is_said_in_a_line(hub: Hub, repo_id: str, revision: str | None, expected: str) -> None:
    with pytest.raises(NotOnHub) as refusal:
        hub.list_files(repo_id, revision)

    assert str(refusal.value).startswith(f"{repo_id}: {expected}")
    assert "\n" not in str(refusal.value)


def test_a_gated_repository_asks_for_a_token(hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    server.faults.needs_token = "hf_right"  # noqa: S105  # of a test's server

    with pytest.raises(NotOnHub) as refusal:
        hub.list_files(REPO, None)

    assert str(refusal.value) == (
        f"{REPO}: the Hub refuses it (status 401); give a token (HF_TOKEN, or `hf auth login`) and accept its "
        "conditions on its page"
    )


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    server.faults.needs_token = "hf_right"  # noqa: S105  # of a test's server

    assert fetch(hub) == DATA

    tokens = {path.split("/")[1]: token for _, path, _, token in server.requests}
    assert tokens == {"someone": "Bearer hf_right", "cdn": None}
