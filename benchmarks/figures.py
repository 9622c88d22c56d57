"""A measured quantity: its samples, and how it is shown. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity in one unit, measured several times."""

    name: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return median(self.samples)

    def as_json(self) -> dict[str, object]:
        """Return it with its summary."""
        return asdict(self) | {"median": self.median, "least": min(self.samples), "greatest": max(self.samples)}


def ratios(values: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    """Return each value over the other one of its round."""
    return tuple(value / other for value, other in zip(values, others, strict=True))


def table(figures: list[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| what | median | least | greatest | unit | n |", "|---|---|---|---|---|---|"]
    for figure in figures:
        numbers = (figure.median, min(figure.samples), max(figure.samples))
        cells = " | ".join(f"{number:.4g}" for number in numbers)
        lines.append(f"| {figure.name} | {cells} | {figure.unit} | {len(figure.samples)} |")
    return "\n".join(lines)
