"""`python -m tests.soak --minutes 10`: random kills for so long; the report; exit code 1 if anything was wrong."""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Event

from benchmarks.machine import describe_machine
from protocol import messages as m
from protocol.control_client import ControlClient
from protocol.runtime_dir import RuntimeDir
from tests.soak.events import Soak
from tests.soak.report import Report, take_sample
from tests.support.crowd import crowd, undisturbed_texts, wrong_texts
from tests.support.daemon import background_pid, run_expertd, stop_background_daemon
from tests.support.segments import segments_of
from tests.support.small_stores import make_small_store
from tests.support.stores import write_random_store
from tests.support.waiting import wait_until

EVENT_EVERY_S = 0.7
SAMPLE_EVERY_S = 5.0


def main() -> None:
    """Soak in a folder of its own and write the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runners", type=int, default=4)
    parser.add_argument("--memory", help="the store's budget, 300KiB for example: its experts come and go in slots")
    parser.add_argument("--json", type=Path, default=Path("build/soak.json"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="expertd-soak-", dir="/tmp"))
    try:
        report = _soak(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(report.as_json())
    sys.stdout.write(report.as_table() + "\n")
    sys.exit(0 if report.is_clean else 1)


def _soak(options: argparse.Namespace, folder: Path) -> Report:
    directory = RuntimeDir(folder / "run")
    os.environ |= {"EXPERTD_RUNTIME_DIR": str(directory.path), "XDG_CONFIG_HOME": str(folder / "config")}
    report = Report(describe_machine().as_json(), options.seed, options.minutes, options.memory)
    files = {"generation_config.json": b'{"eos_token_id": 99999}'}
    store = make_small_store(folder / "model", files=files, vocab=258, n_layers=4, n_experts=8).path
    other = folder / "other"
    write_random_store(other, hidden=512, intermediate=1024, n_layers=2, n_experts=8)
    expected = undisturbed_texts(store)
    stop_background_daemon(directory)
    if options.memory:
        (folder / "config" / "expertd").mkdir(parents=True)
        settings = f'[stores."{store}"]\nmemory = "{options.memory}"\n'
        (folder / "config" / "expertd" / "expertd.toml").write_text(settings)
    run_expertd("start", store)
    try:
        with crowd(store, folder / "crowd", options.seed) as gathered:
            soak = Soak(directory, store, other, gathered, random.Random(options.seed))
            gathered.begin(options.runners)
            _run(soak, report, options.minutes * 60)
            soak.settle()
            for complaint in gathered.end():
                soak.complaints[complaint] += 1
            texts = gathered.texts()
            report.n_runners = len(gathered.members) + len(gathered.former)
        report.left = _left(directory)
    finally:
        stop_background_daemon(directory)
    report.n_texts, report.n_tokens = len(texts), sum(len(tokens) for _, tokens in texts)
    report.n_wrong_texts = len(wrong_texts(texts, expected))
    report.events, report.complaints = dict(soak.n_events), dict(soak.complaints)
    return report


def _run(soak: Soak, report: Report, seconds: float) -> None:
    start = time.monotonic()
    sample_at = start
    while time.monotonic() < start + seconds:
        Event().wait(EVENT_EVERY_S)
        soak.one_event()
        if time.monotonic() >= sample_at:
            sample_at += SAMPLE_EVERY_S
            sample = take_sample(soak.directory, start)
            if sample is not None:
                report.samples.append(sample)


def _left(directory: RuntimeDir) -> list[str]:
    """Return what is still held when every runner has ended and every store is unloaded: it should be nothing."""
    pid = background_pid(directory)
    if pid is None:
        return ["no daemon that could be asked"]
    with ControlClient(directory) as client:
        stores = client.ask(m.GetStatus(), m.Status).stores
        for store in stores:
            client.ask(m.Unload(store.digest), m.Unloaded)
        with suppress(TimeoutError):
            wait_until(lambda: _is_idle(client), "every session to end")
        status = client.ask(m.GetStatus(), m.Status)
    left = [f"session of {session.pid}" for session in status.sessions if session.pid != os.getpid()]
    left += [f"store {store.digest[:12]} is {store.state}" for store in status.stores]
    left += [f"segment of {nbytes} bytes" for nbytes in segments_of(pid).values()]
    return left


def _is_idle(client: ControlClient) -> bool:
    status = client.ask(m.GetStatus(), m.Status)
    return len(status.sessions) == 1 and not status.stores


if __name__ == "__main__":
    main()
