"""Commands about a store's files, which need no daemon: `expertd quantize`, `verify` and `inspect`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertd.errors import ExpertdError, StoreInvalid
from expertd.progress import conversion_progress, progress_bar, say

if TYPE_CHECKING:
    from expertd.convert.checkpoint import CheckpointFiles
    from expertd.convert.config import QuantizeConfig

STORE = click.argument("store", type=click.Path(path_type=Path))


@click.command()
@click.argument("source")
@STORE
@click.option(
    "--config", type=click.Path(path_type=Path), help="Which scheme for what: configs/*.toml [default: 4 bits]."
)
@click.option("--revision", help="Branch, tag or commit of a repository on the Hub [default: main].")
@click.option("--discard-source", is_flag=True, help="Delete each shard that was fetched from the Hub after its use.")
@click.option("--plan", is_flag=True, help="Make nothing; say sizes, memory and time, from headers and one expert.")
@click.option("--force", is_flag=True, help="Replace an existing store.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=None,
    help="Worker processes [default: one a processor, within 3 GB].",
)
def quantize(
    source: str,
    store: Path,
    *,
    config: Path | None,
    revision: str | None,
    discard_source: bool,
    plan: bool,
    force: bool,
    jobs: int | None,
) -> None:
    """Make STORE from the Mixtral checkpoint SOURCE: a folder, or a repository on the Hugging Face Hub (owner/name).

    What an interrupted run has finished is kept: the same command goes on from there.
    """
    from expertd.convert.config import QuantizeConfig, load_config
    from expertd.convert.errors import ConvertError
    from expertd.convert.source import open_source
    from expertd.store import path_problem

    problem = path_problem(str(store.absolute()))
    if problem:
        raise ExpertdError(f"{store}: {problem}, and no daemon could hold it")
    try:
        schemes = QuantizeConfig() if config is None else load_config(config)
        files = open_source(source, revision=revision, discards=discard_source, say=say)
        if plan:
            from expertd.convert.dry_run import forecast

            click.echo(forecast(files, schemes, n_jobs=jobs))
        else:
            _quantize(files, store, schemes, force=force, jobs=jobs, discards=discard_source)
    except ConvertError as error:
        raise ExpertdError(str(error)) from None


@click.command()
@STORE
def verify(store: Path) -> None:
    """Check every byte of STORE against its checksums; exit code 1 if one is wrong."""
    from expertd.verify import verify_store

    with naming(store), progress_bar("verifying") as on_progress:
        report = verify_store(store, on_progress)
    for name in report.wrong:
        click.echo(f"{name}: its checksum is wrong", err=True)
    if report.wrong:
        raise ExpertdError(f"{store}: {len(report.wrong)} of {report.n_checked} are damaged; make the store again")
    click.echo(f"{store}: {report.n_checked} records and files are whole ({report.nbytes / 1e9:.2f} GB)")


@click.command()
@STORE
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(store: Path, as_json: bool) -> None:
    """Show what STORE holds: model, sizes, schemes, and what its weights lost."""
    from expertd.inspection import inspect_json, inspect_text
    from expertd.store import read_manifest

    with naming(store):
        manifest = read_manifest(store)
    click.echo(json.dumps(inspect_json(manifest)) if as_json else inspect_text(store, manifest))


@contextmanager
def naming(store: Path) -> Iterator[None]:
    """Make an error name the store it is about: several may stand on the command line."""
    try:
        yield
    except StoreInvalid as error:
        if str(error).startswith(str(store)):
            raise
        raise StoreInvalid(f"{store}: {error}") from None


def _quantize(
    files: "CheckpointFiles", store: Path, schemes: "QuantizeConfig", *, force: bool, jobs: int | None, discards: bool
) -> None:
    from expertd.convert.quantize import quantize_source
    from expertd.convert.written import added_error

    with conversion_progress() as on_progress:
        made = quantize_source(
            files, store, schemes, force=force, n_jobs=jobs, discards=discards, on_progress=on_progress, say=say
        )
    manifest = made.manifest
    nbytes = manifest.experts_nbytes + manifest.dense_nbytes
    click.echo(f"expertd: {store} is made: {nbytes / 1e9:.2f} GB, digest {manifest.digest[:12]}", err=True)
    if made.n_quantized_before:
        click.echo(
            f"expertd: {made.n_quantized_before} of its matrices were quantized before; to what they had lost then, "
            f"{manifest.schemes.experts} adds an error of {added_error(manifest):.1%} to the experts' weights",
            err=True,
        )
