"""The commands that look and change nothing: status, top, doctor."""

import json
import math
import sys
from pathlib import Path

import click

from expertd.config import my_runtime_dir
from protocol.control_client import ControlClient
from protocol.errors import DaemonSilent, DaemonUnavailable


def connect() -> ControlClient:
    """Return a session with this user's daemon; raise DaemonUnavailable, with what to do, if none runs."""
    try:
        return ControlClient(my_runtime_dir())
    except DaemonSilent:
        raise
    except DaemonUnavailable as error:
        raise DaemonUnavailable(f"{error}; start it with `expertd start STORE`") from None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(as_json: bool) -> None:
    """Show what the daemon holds and for whom; exit code 1 if none runs."""
    from expertd.show import status_json, status_text
    from protocol.messages import GetStatus, Status

    try:
        client = connect()
    except DaemonUnavailable:
        if as_json:
            click.echo(json.dumps({"running": False}))
            sys.exit(1)
        raise
    with client:
        answer = client.ask(GetStatus(), Status)
    click.echo(json.dumps(status_json(answer)) if as_json else status_text(answer))


@click.command()
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="Seconds between refreshes."
)
def top(interval: float) -> None:
    """Show what happens in the daemon, again and again, until q or Ctrl-C. Without a terminal: its status, once."""
    from expertd.show import status_text
    from expertd.top import can_show, show_top
    from protocol.messages import GetStatus, Status

    if not math.isfinite(interval):
        raise click.UsageError(f"--interval: a number of seconds was expected, {interval} came")
    with connect() as client:
        if not can_show():
            click.echo(status_text(client.ask(GetStatus(), Status)))
            click.echo("expertd: no terminal, so this was one look; `expertd status --json` is for programs", err=True)
            return
        try:
            show_top(client, interval)
        except DaemonUnavailable as error:  # it has ended, or hangs
            click.echo(f"expertd: no more answers from the daemon, pid {client.welcome.pid}: {error}", err=True)


@click.command()
@click.argument("store", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(store: Path | None, as_json: bool) -> None:
    """Show what on this machine limits expertd, and STORE, and the remedies; exit code 1 if something prevents use."""
    from expertd.doctor.examination import examine
    from expertd.doctor.findings import exit_code, findings_json, findings_text

    findings = examine(my_runtime_dir(), store)
    click.echo(json.dumps(findings_json(findings)) if as_json else findings_text(findings))
    sys.exit(exit_code(findings))
