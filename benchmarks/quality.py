"""What quantizing costs a model: a store for each pair of widths, held against the checkpoint in 16 bits.

Rows and columns are those of the reference system's own table (attention and experts at 16, 4, 3 and 2 bits); below it
stand plain HQQ and HQQ refined, whose bytes are equally many. Embeddings, norms, gates and head stay in 16 bits.
Any Mixtral checkpoint in a folder will do; a text has to be given.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import NothingToMeasure
from benchmarks.figures import Figure
from benchmarks.processes import Environment
from benchmarks.settings import Settings

SCHEMES = {16: "16bit", 4: "4bit-g64", 3: "3bit-g64", 2: "2bit-g16"}
_WINDOW = 512

_PERPLEXITY, _DIVERGENCE, _AGREEMENT, _SIZE = "perplexity", "KL divergence", "same most probable token", "store"


@dataclass(frozen=True, slots=True)
class Widths:
    """One store of the table: bits of attention and experts, and whether HQQ was refined."""

    attention: int
    experts: int
    refine: bool = True

    @property
    def name(self) -> str:
        """How its figures begin."""
        return f"attention {self.attention}, experts {self.experts}{'' if self.refine else ', plain HQQ'}"

    @property
    def config(self) -> str:
        """The configuration that makes it."""
        return (
            f'experts = "{SCHEMES[self.experts]}"\nattention = "{SCHEMES[self.attention]}"\nhead = "16bit"\n'
            f"refine = {str(self.refine).lower()}\n"
        )


REFERENCE = Widths(16, 16)
TABLE = tuple(Widths(attention, experts) for attention in SCHEMES for experts in SCHEMES)
PLAIN = tuple(Widths(16, experts, refine=False) for experts in (4, 3, 2))


def measure_quality(environment: Environment, settings: Settings) -> list[Figure]:
    """Return size, perplexity, KL divergence and agreement of every store; raise BenchmarkError."""
    if settings.checkpoint is None or settings.text is None:
        raise NothingToMeasure("quality: --checkpoint and --text are needed")
    settings.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quality-", dir=settings.folder) as folder:
        measurement = _Measurement(environment, settings.checkpoint, settings.text, settings.tokens, Path(folder))
        reference = measurement.make(REFERENCE)
        with environment.daemon(reference):
            others = [widths for widths in (*TABLE, *PLAIN) if widths != REFERENCE]
            return [figure for widths in others for figure in measurement.measure(widths, reference)]


def quality_table(figures: Sequence[Figure]) -> str:
    """Return the figures as the paper's table, attention by experts, and plain HQQ beside refined; in Markdown."""
    values = {figure.name: figure.median for figure in figures}
    values |= {f"{REFERENCE.name}: {what}": values[f"reference: {what}"] for what in (_PERPLEXITY, _SIZE)}
    return "\n".join([*_grid(values), "", *_beside_plain(values)])


def _grid(values: dict[str, float]) -> Iterator[str]:
    yield "| attention \\ experts (GB / perplexity) | " + " | ".join(f"{experts} bits" for experts in SCHEMES) + " |"
    yield "|---" * (1 + len(SCHEMES)) + "|"
    for attention in SCHEMES:
        cells = [_cell(values, Widths(attention, experts)) for experts in SCHEMES]
        yield f"| {attention} bits | " + " | ".join(cells) + " |"


def _cell(values: dict[str, float], widths: Widths) -> str:
    return f"{values[f'{widths.name}: {_SIZE}']:.3f} / {values[f'{widths.name}: {_PERPLEXITY}']:.2f}"


def _beside_plain(values: dict[str, float]) -> Iterator[str]:
    yield "| experts (attention 16 bits) | GB | KL, nats | perplexity | same top token |"
    yield "|---|---|---|---|---|"
    for plain in PLAIN:
        for widths in (plain, Widths(plain.attention, plain.experts)):
            size, nats, perplexity, same = (
                values[f"{widths.name}: {what}"] for what in (_SIZE, _DIVERGENCE, _PERPLEXITY, _AGREEMENT)
            )
            kind = "refined" if widths.refine else "plain HQQ"
            yield f"| {widths.experts} bits, {kind} | {size:.3f} | {nats:.5f} | {perplexity:.3f} | {same:.2%} |"


@dataclass(frozen=True, slots=True)
class _Measurement:
    """The checkpoint, the text, and where stores lie while they are measured."""

    environment: Environment
    checkpoint: Path
    text: Path
    n_tokens: int
    folder: Path

    def make(self, widths: Widths) -> Path:
        """Return the checkpoint quantized so."""
        print(f"  {widths.name} …", file=sys.stderr)
        store = self.folder / widths.name.replace(", ", "-").replace(" ", "")
        config = self.folder / "config.toml"
        config.write_text(widths.config)
        self.environment.expertd("quantize", str(self.checkpoint), str(store), "--config", str(config))
        return store

    def measure(self, widths: Widths, reference: Path) -> Iterator[Figure]:
        """Yield the figures of one store, and those of the reference with the first."""
        store = self.make(widths)
        self.environment.expertd("load", str(store))
        try:
            arguments = ["--text", str(self.text), "--tokens", str(self.n_tokens), "--window", str(_WINDOW), "--json"]
            document = json.loads(self.environment.runner("compare", str(reference), str(store), *arguments))
        finally:
            self.environment.expertd("unload", str(store))
        if widths == next(other for other in TABLE if other != REFERENCE):
            yield Figure(f"reference: {_SIZE}", "GB", (_store_gb(reference),))
            yield Figure(f"reference: {_PERPLEXITY}", "", (document["reference_perplexity"],))
        yield Figure(f"{widths.name}: {_SIZE}", "GB", (_store_gb(store),))
        yield Figure(f"{widths.name}: {_PERPLEXITY}", "", (document["other_perplexity"],))
        yield Figure(f"{widths.name}: {_DIVERGENCE}", "nats", (document["divergence_nats"],))
        yield Figure(f"{widths.name}: {_AGREEMENT}", "", (document["top_agreement"],))
        _remove(store)


def _store_gb(store: Path) -> float:
    return sum(path.stat().st_size for path in store.iterdir()) / 1e9


def _remove(store: Path) -> None:
    for path in store.iterdir():
        path.unlink()
    store.rmdir()
