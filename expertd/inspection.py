"""What a store holds, for a person and for a program: model, sizes, schemes, errors. Pure: a manifest in, text out.

An error is ||w - ŵ|| / ||w|| of one matrix; that of several is the root of their mean square.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from protocol.handles import ExpertKey
from protocol.layout import Part
from protocol.manifest import Manifest, Record
from protocol.version import STORE_FORMAT_VERSION

_HEAD = ("layer", "experts", "GB", "bits", "w1", "w3", "w2", "worst", "attention")
_NOT_MEASURED = "-"
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def inspect_text(path: Path, manifest: Manifest) -> str:
    """Return what `expertd inspect` prints: the store in rows of words, then a table of its layers."""
    model, schemes = manifest.model, manifest.schemes
    rows = [
        ("store", f"{path}, format {STORE_FORMAT_VERSION}, digest {manifest.digest[:12]}"),
        (
            "model",
            f"{model.architecture}, {model.n_layers} layers of {model.n_experts} experts, {model.top_k} per token",
        ),
        ("sizes", f"hidden {model.hidden_size}, expert {model.intermediate_size}"),
        ("experts", f"{_mixture(manifest.experts.values())}, {_weight_text(manifest.experts.values())}"),
        (
            "dense",
            f"attention {schemes.attention}, head {schemes.head}, rest {schemes.other}, "
            f"{_gb(manifest.dense_nbytes)} GB",
        ),
        ("solver", manifest.solver),
        *_expert_rows(manifest),
        ("files", ", ".join(file.name for file in manifest.files)),
    ]
    words = "\n".join(f"{name:<11} {text}" for name, text in rows)
    return f"{words}\n\n{_table(_HEAD, [_layer_row(manifest, layer) for layer in range(model.n_layers)])}"


def inspect_json(manifest: Manifest) -> dict[str, object]:
    """Return what `expertd inspect --json` prints: everything but where the single records lie."""
    experts = manifest.experts
    return {
        "format_version": STORE_FORMAT_VERSION,
        "digest": manifest.digest,
        "model": asdict(manifest.model),
        "schemes": asdict(manifest.schemes),
        "solver": manifest.solver,
        "n_experts_in_all": len(experts),
        "expert_nbytes": max(record.nbytes for record in experts.values()),
        "experts_nbytes": manifest.experts_nbytes,
        "experts_bits_per_weight": _bits_per_weight(experts.values()),
        "experts": {str(key): _record_json(manifest, str(key), record) for key, record in experts.items()},
        "layers": [_layer_json(manifest, layer) for layer in range(manifest.model.n_layers)],
        "dense_nbytes": manifest.dense_nbytes,
        "dense": {name: _record_json(manifest, name, record) for name, record in manifest.dense.items()},
        "files": [asdict(file) for file in manifest.files],
    }


def _layer_row(manifest: Manifest, layer: int) -> tuple[str, ...]:
    records = _experts_of(manifest, layer)
    by_part = _errors_by_part(manifest, records)
    return (
        str(layer),
        _who_has_what(records),
        _gb(sum(record.nbytes for record in records.values())),
        f"{_bits_per_weight(records.values()):.3f}",
        *(_error_text(by_part.get(name, [])) for name in ("w1", "w3", "w2")),
        _error_text([max((error for errors in by_part.values() for error in errors), default=math.nan)]),
        _error_text(_attention_errors(manifest, layer)),
    )


def _layer_json(manifest: Manifest, layer: int) -> dict[str, object]:
    records = _experts_of(manifest, layer)
    by_part = _errors_by_part(manifest, records)
    return {
        "nbytes": sum(record.nbytes for record in records.values()),
        "bits_per_weight": _bits_per_weight(records.values()),
        "schemes": _schemes(records.values()),
        "weight_errors": {name: _root_mean_square(errors) for name, errors in by_part.items()},
        "attention_weight_error": _root_mean_square(_attention_errors(manifest, layer)),
    }


def _record_json(manifest: Manifest, name: str, record: Record) -> dict[str, object]:
    errors = manifest.weight_errors.get(name)
    return {
        "nbytes": record.nbytes,
        "schemes": [part.scheme for part in record.parts],
        "weight_errors": None if errors is None else list(errors),
    }


def _experts_of(manifest: Manifest, layer: int) -> dict[ExpertKey, Record]:
    return {key: record for key, record in manifest.experts.items() if key.layer == layer}


def _errors_by_part(manifest: Manifest, records: dict[ExpertKey, Record]) -> dict[str, list[float]]:
    """Return the errors of those experts' matrices by the name of the part; nothing of what was not measured."""
    by_part: dict[str, list[float]] = {}
    for key, record in records.items():
        for part, error in zip(record.parts, manifest.weight_errors.get(str(key), ()), strict=False):
            by_part.setdefault(part.name, []).append(error)
    return by_part


def _attention_errors(manifest: Manifest, layer: int) -> list[float]:
    names = (f"layers.{layer}.{name}" for name in _ATTENTION)
    return [error for name in names for error in manifest.weight_errors.get(name, ())]


def _root_mean_square(errors: Sequence[float]) -> float | None:
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else None


def _error_text(errors: Sequence[float]) -> str:
    error = _root_mean_square(errors)
    return _NOT_MEASURED if error is None or math.isnan(error) else f"{error:.4f}"


def _schemes(records: Iterable[Record]) -> dict[str, int]:
    """Return how many of those records have which schemes, the most frequent first."""
    counts = Counter("/".join(dict.fromkeys(part.scheme for part in record.parts)) for record in records)
    return dict(counts.most_common())


def _mixture(records: Iterable[Record]) -> str:
    counts = _schemes(records)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{n} {scheme}" for scheme, n in counts.items())


def _who_has_what(records: dict[ExpertKey, Record]) -> str:
    """Return the mixture of a layer's experts, those named that have not what most have."""
    most, *others = _schemes(records.values()).items()
    words = [f"{most[1]} {most[0]}" if others else most[0]]
    for scheme, n in others:
        named = ", ".join(str(key.expert) for key, record in records.items() if _schemes([record]) == {scheme: 1})
        words.append(f"{n} {scheme} ({'expert' if n == 1 else 'experts'} {named})")
    return ", ".join(words)


def _weight_text(records: Iterable[Record]) -> str:
    listed = list(records)
    nbytes = sum(record.nbytes for record in listed)
    return f"{_gb(nbytes)} GB, {_bits_per_weight(listed):.3f} bits per weight"


def _expert_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Return a row for each kind of expert that there is."""
    kinds = dict.fromkeys((record.nbytes, record.parts) for record in manifest.experts.values())
    texts = [f"{nbytes / 1e6:.1f} MB: " + ", ".join(map(_part_text, parts)) for nbytes, parts in kinds]
    return [("one expert" if number == 0 else "or", text) for number, text in enumerate(texts)]


def _part_text(part: Part) -> str:
    return f"{part.name} {part.rows} x {part.cols} {part.scheme}"


def _bits_per_weight(records: Iterable[Record]) -> float:
    listed = list(records)
    n_weights = sum(part.rows * part.cols for record in listed for part in record.parts)
    return sum(record.nbytes for record in listed) * 8 / n_weights


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the rows under their head, in columns as wide as need be; words to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if name == "experts" else cell.rjust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
