"""How the demo's outcome is shown: one table of figures, one of answers, and where things are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from orbit.demo.score import normalise

if TYPE_CHECKING:
    from orbit.demo.run import Report


def print_report(report: Report, console: Console) -> None:
    """Print a report."""
    console.print(_figures(report))
    console.print(_answers(report))
    console.print(f"adapter written to {report.adapter} (PEFT's format)", highlight=False, soft_wrap=True)
    if report.difference is None:
        console.print(
            'not compared with PEFT, which is not installed: pip install "peft>=0.18"', highlight=False
        )
    else:
        console.print(
            f"its logits, loaded here and loaded by PEFT, differ by at most {report.difference:.1e}",
            highlight=False,
        )
    console.print(
        f"training {report.training_seconds:.0f} s, evaluation {report.evaluation_seconds:.0f} s",
        highlight=False,
    )
    console.print("\nchat with it:")
    console.print(f"  {report.chat}", highlight=False, markup=False, soft_wrap=True)


def _figures(report: Report) -> Table:
    before, after, count = report.before, report.after, len(report.facts)
    table = Table(title=f"{report.model} before and after {count} facts", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("exact match, trained wording", f"{before.trained:.1%}", f"{after.trained:.1%}")
    table.add_row("exact match, unseen paraphrase", f"{before.unseen:.1%}", f"{after.unseen:.1%}")
    change = after.perplexity / before.perplexity - 1
    table.add_row(
        "perplexity, unrelated prose", f"{before.perplexity:.2f}", f"{after.perplexity:.2f} ({change:+.1%})"
    )
    wordings = max(len(fact.taught) for fact in report.facts)
    table.caption = (
        "Exact match: the whole greedy reply is the answer.\n"
        f"A fact was taught in {wordings} wording{'s' * (wordings > 1)}, of which the first is measured; "
        "the paraphrase is none of them."
    )
    table.caption_justify = "left"
    return table


def _answers(report: Report, rows: int = 6) -> Table:
    """Some facts at even distances, each in the unseen wording: picked by place, not by success."""
    table = Table(title="answers to unseen paraphrases", title_justify="left")
    for heading in ("question", "fact", "before", "after"):
        table.add_column(heading)
    for i in range(0, len(report.facts), max(1, len(report.facts) // rows)):
        fact, reply = report.facts[i], report.after.paraphrased[i]
        style = "green" if normalise(reply) == normalise(fact.answer) else "red"
        table.add_row(
            fact.paraphrase, fact.answer, _line(report.before.paraphrased[i]), f"[{style}]{_line(reply)}[/]"
        )
    return table


def _line(text: str) -> str:
    """On one line, with rich's markup characters made harmless."""
    return " ".join(text.split()).replace("[", r"\[")
