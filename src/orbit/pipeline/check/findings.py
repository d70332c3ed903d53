"""What a check found, and what it measured on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        level: "error", which the command's exit status tells; "warning", which works and is probably not meant; "note".
        rule: a short name for programs: "all-masked".
    """

    level: Level
    rule: str
    message: str


@dataclass
class Report:
    """Everything that a check has to say.

    Attributes:
        facts: what was counted and measured, by section; plain values.
        samples: three samples as [(text of a token, whether it is supervised), ...].
    """

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)

    def error(self, rule: str, message: str) -> None:
        self.findings.append(Finding("error", rule, message))

    def warning(self, rule: str, message: str) -> None:
        self.findings.append(Finding("warning", rule, message))

    def note(self, rule: str, message: str) -> None:
        self.findings.append(Finding("note", rule, message))

    @property
    def ok(self) -> bool:
        """No error was found."""
        return all(finding.level != "error" for finding in self.findings)

    def rules(self) -> set[str]:
        """The names of what was found."""
        return {finding.rule for finding in self.findings}

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"ok": self.ok, **asdict(self)}
