"""A finding: what was looked at, how it is, and what can be done. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # everything works; something is slower, smaller or less safe than it could be
    PROBLEM = "problem"  # something prevents use


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    remedy: str | None = None


def ok(name: str, found: str) -> Finding:
    """Return the finding that all is well."""
    return Finding(name, Level.OK, found)


def note(name: str, found: str, remedy: str) -> Finding:
    """Return the finding that something could be better."""
    return Finding(name, Level.NOTE, found, remedy)


def problem(name: str, found: str, remedy: str) -> Finding:
    """Return the finding that something prevents use."""
    return Finding(name, Level.PROBLEM, found, remedy)


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if something prevents use, else 0."""
    return int(any(finding.level is Level.PROBLEM for finding in findings))


def findings_text(findings: Sequence[Finding]) -> str:
    """Return the findings as a table for people, with a last line that sums up."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.name:<{width}}  {finding.found}")
        if finding.remedy is not None:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.remedy}")
    return "\n".join([*lines, "", _summary(findings)])


def findings_json(findings: Sequence[Finding]) -> dict[str, object]:
    """Return the findings for a program."""
    return {"usable": not exit_code(findings), "findings": [asdict(finding) for finding in findings]}


def _summary(findings: Sequence[Finding]) -> str:
    n_problems = sum(finding.level is Level.PROBLEM for finding in findings)
    n_notes = sum(finding.level is Level.NOTE for finding in findings)
    if n_problems:
        return f"{n_problems} of these prevent(s) use; {n_notes} note(s)"
    return f"expertd can be used here; {n_notes} note(s)" if n_notes else "expertd can be used here; nothing limits it"
