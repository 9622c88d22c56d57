"""A checkpoint that lies on the Hub becomes the store that its folder becomes: a local server stands for the Hub.

Every run is a process of its own, as where the Hub is and where its cache lies is read from the environment once.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.manifest import Manifest
from tests.support.checkpoints import write_checkpoint
from tests.support.half_done import GOES_ON, children_of, go_on, is_kept, manifest_of, names_in
from tests.support.hub_server import COMMIT, REPO, HubServer, environment, hub_server
from tests.support.waiting import wait_for_exit, wait_until

CONFIG = 'experts = "3bit-g64"\nattention = "2bit-g16"\nhead = "4bit-g64"\n'
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", dtype="bf16", n_shards=3, dealt=False)
    (folder / "tokenizer.json").write_text('{"tokenizer": true}')
    return folder


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The manifest of the store that the folder becomes."""
    manifest, _ = go_on(checkpoint, tmp_path_factory.mktemp("stores") / "finished")
    return manifest


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server(shutil.copytree(checkpoint, tmp_path / "hub")) as running:
        yield running


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "config.toml").write_text(CONFIG)
    return folder


def start(server: HubServer, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "expertd", "quantize", REPO, str(out / "store"), "--jobs", "1"]
    return subprocess.Popen(
        [*command, "--config", str(out.parent / "config.toml"), *options],
        env=environment(server, out.parent / "cache"),
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(server: HubServer, out: Path, *options: str) -> str:
    """Run to the end; return what it said, which must not be a traceback."""
    with start(server, out, *options) as process:
        _, said = process.communicate()
    assert "Traceback" not in said
    return said


def cached(out: Path) -> list[str]:
    return sorted(path.name for path in (out.parent / "cache").rglob("snapshots/*/*.safetensors"))


def test_a_repository_becomes_the_store_that_its_folder_becomes(
    server: HubServer, out: Path, finished: Manifest
) -> None:
    said = run(server, out)

    assert said == f"expertd: {out / 'store'} is made: 0.00 GB, digest {finished.digest[:12]}\n"
    assert manifest_of(out / "store") == finished
    assert cached(out) == SHARDS
    assert names_in(out) == ["store"]


def test_what_the_users_cache_has_is_not_fetched_again(server: HubServer, out: Path, finished: Manifest) -> None:
    run(server, out)
    before = {name: len(server.sent_of(name)) for name in SHARDS}

    run(server, out, "--force", "--revision", "main")

    # One request a shard, for its header.
    assert {name: len(server.sent_of(name)) - n for name, n in before.items()} == dict.fromkeys(SHARDS, 1)
    assert manifest_of(out / "store") == finished


def test_with_discard_source_no_shard_stays(server: HubServer, out: Path, finished: Manifest) -> None:
    run(server, out, "--discard-source")

    assert manifest_of(out / "store") == finished
    assert cached(out) == []
    assert names_in(out) == ["store"]


def test_a_broken_connection_damaged_bytes_and_a_server_in_trouble_change_nothing(
    server: HubServer, out: Path, finished: Manifest
) -> None:
    server.faults.cut_after = [1000, 2000, 3000]
    server.faults.statuses = [503, 502]

    said = run(server, out)

    # Whoever waits sees why: the first header was refused twice.
    assert said.splitlines()[:2] == [
        f"expertd: {REPO}: {SHARDS[0]}: the Hub answers with status 503; asking again at once (2 of 7)",
        f"expertd: {REPO}: {SHARDS[0]}: the Hub answers with status 502; asking again in 1 s (3 of 7)",
    ]
    assert manifest_of(out / "store") == finished


def test_bytes_that_are_not_those_the_hub_promises_are_fetched_once_more(
    server: HubServer, out: Path, finished: Manifest
) -> None:
    server.faults.damages = 1

    run(server, out)

    assert manifest_of(out / "store") == finished
    assert [len(server.sent_of(name)) for name in SHARDS] == [3, 2, 2]


def test_bytes_that_stay_others_than_those_the_hub_promises_are_refused(server: HubServer, out: Path) -> None:
    server.faults.damages = 2

    said = run(server, out)

    assert said == f"expertd: {REPO}: {SHARDS[0]}: twice its bytes were not those the Hub promises\n"
    assert names_in(out) == []


def test_a_run_that_is_killed_in_the_middle_of_a_shard_goes_on_with_the_rest_of_it(
    server: HubServer, out: Path, finished: Manifest
) -> None:
    server.faults.stalls_after = 40_000
    with start(server, out, "--discard-source") as process:
        assert server.faults.stalled.wait(60)
        wait_until(lambda: any(path.stat().st_size for path in out.rglob("*.expertd-part")), "the first bytes")
        children = children_of(process.pid)
        process.kill()
        process.communicate()
    for child in children:
        wait_for_exit(child)
    server.faults.stalls_after = None
    server.faults.go_on.set()
    (nbytes,) = (path.stat().st_size for path in out.rglob("*.expertd-part"))
    n_before = len(server.requests)

    run(server, out, "--discard-source")

    ranges = [range_ or "" for _, path, range_, _ in server.requests[n_before:] if path == f"/cdn/{SHARDS[0]}"]
    assert [range_.split("-")[0] for range_ in ranges] == ["bytes=0", f"bytes={nbytes}"]
    assert manifest_of(out / "store") == finished
    assert names_in(out) == ["store"]


def test_a_hub_that_refuses_in_the_middle_of_it_all_costs_nothing_that_was_done(
    server: HubServer, out: Path, finished: Manifest
) -> None:
    server.faults.stalls_after = 40_000
    with start(server, out, "--discard-source") as process:
        assert server.faults.stalled.wait(60)
        server.faults.statuses = [403]
        server.faults.go_on.set()
        _, said = process.communicate()
    server.faults.stalls_after = None
    was_kept = is_kept(out)

    run(server, out, "--discard-source")

    assert said.startswith(f"expertd: {REPO}: {SHARDS[0]}: the Hub refuses it (status 403); ")
    assert said.endswith(f"{GOES_ON}\n")
    assert was_kept
    assert manifest_of(out / "store") == finished


def test_what_keeps_a_shard_from_coming_is_told_while_others_are_quantized(
    server: HubServer, out: Path, finished: Manifest
) -> None:
    server.faults.stalls_after = 40_000
    with start(server, out) as process:
        assert server.faults.stalled.wait(60)
        server.faults.stalls_after = None
        server.faults.statuses = [503]
        server.faults.go_on.set()
        _, said = process.communicate()

    assert said.splitlines()[0] == (
        f"expertd: {REPO}: {SHARDS[0]}: the Hub answers with status 503; asking again in 1 s (3 of 7)"
    )
    assert manifest_of(out / "store") == finished


def test_what_is_finished_is_not_fetched_again(server: HubServer, out: Path, finished: Manifest) -> None:
    with start(server, out, "--discard-source") as process:
        wait_until(lambda: len(server.sent_of(SHARDS[2])) == 2, "the last shard's request")
        shards = [path.name for path in out.rglob("model-*") if path.suffix == ".safetensors"]
        children = children_of(process.pid)
        process.kill()
        process.communicate()
    for child in children:
        wait_for_exit(child)
    n_before = len(server.requests)

    run(server, out, "--discard-source")

    asked = [path for _, path, _, _ in server.requests[n_before:]]
    assert manifest_of(out / "store") == finished
    assert SHARDS[0] not in shards
    # For its header.
    assert asked.count(f"/cdn/{SHARDS[0]}") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--revision", "v9"], f"expertd: {REPO}: the repository has no such revision\n"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(
    server: HubServer, out: Path, options: list[str], expected: str
) -> None:
    with start(server, out, *options) as process:
        _, said = process.communicate()

    assert (process.returncode, said) == (1, expected)
    assert names_in(out) == []


def test_pickled_weights_are_refused_before_anything_is_fetched(server: HubServer, out: Path) -> None:
    for path in server.folder.glob("*.safetensors*"):
        path.unlink()
    (server.folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")

    said = run(server, out)

    assert said == (
        f"expertd: {REPO}: holds pickled weights (pytorch_model-00001-of-00002.bin), which can run code when they are "
        "read; save the model again as safetensors: transformers' from_pretrained, then save_pretrained\n"
    )
    assert all(not path.endswith(".bin") for _, path, _, _ in server.requests)


def test_a_repository_of_another_kind_is_refused_from_its_configuration(server: HubServer, out: Path) -> None:
    path = server.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))

    said = run(server, out, "--revision", COMMIT)

    assert said == "expertd: config.json: model_type 'llama' is not supported; 'mixtral' is\n"
    assert names_in(out) == []


def test_a_plan_is_made_from_the_headers_alone_and_leaves_nothing(server: HubServer, out: Path) -> None:
    with start(server, out, "--plan") as process:
        text, said = process.communicate()

    assert (process.returncode, said) == (0, "")
    assert text.startswith(f"{REPO}: 2 layers of 4 experts, 2 per token, ")
    assert "time: about " in text
    assert names_in(out) == []
    assert [len(server.sent_of(name)) for name in SHARDS] == [1, 1, 1]
