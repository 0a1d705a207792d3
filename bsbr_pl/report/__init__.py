"""The report: one HTML file that needs nothing else, the same in Markdown, tables as CSV, plots as PNG.

`write_report` is a function of rows alone (bsbr_pl.results describes them): no torch, no checkpoint, no data.
"""

import base64
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from bsbr_pl.utils.files import write_whole

from . import clocks, costs, maps, quality, sources, study, verdict
from .budgets import warned, warnings
from .plots import Picture, Plot
from .rows import Row
from .studies import Findings, Study
from .tables import Table, markdown

__all__ = ["write_report", "warnings"]

TITLE = "Attention architectures compared"
LEAD = (
    "Certified first, then compared: no figure of a model that sees the future is ranked, budgets are equal in every "
    "ranking, and nothing is averaged but seeds of finished runs. Every number names its environment (E) and command "
    "(C), listed at the end."
)
NO_PROBLEMS = "None: every checkpoint was read and measured, and every run finished."
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=jinja2.select_autoescape(),
                           trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip


class Words(NamedTuple):
    """A `heading`, a `verdict` or a `paragraph`."""

    kind: str
    text: str


Part = Words | Table | Plot | Picture


def write_report(rows: Iterable[Row], folder: Path) -> Path:
    """Write report.html, report.md, tables/ and plots/ into `folder`; the same rows give the same bytes.

    Args:
        rows: as `bsbr_pl.results.Results.rows` gives them.

    Returns:
        the path of report.html.

    Raises:
        OSError: naming the file that cannot be written.
    """
    findings = Findings(rows)
    sections = contents(findings)
    for part in itertools.chain.from_iterable(sections.values()):
        if isinstance(part, Table):
            write_whole(folder / "tables" / f"{part.name}.csv", part.to_csv().encode())
        elif isinstance(part, Plot | Picture):
            write_whole(folder / "plots" / f"{part.name}.png", part.image("png"))
    page = {"title": TITLE, "lead": LEAD, "warnings": warned(findings), "sections": sections}
    for name in ("report.md", "report.html"):
        write_whole(folder / name, PAGES.get_template(name).render(page).encode())
    return folder / "report.html"


def contents(findings: Findings) -> dict[str, list[Part]]:
    """Everything the report says, by title; a section without content is left out."""
    text, recall = ([study for study in findings.studies if study.recall == of] for of in (False, True))
    sections: dict[str, list[Any]] = {
        "Verdict": [part for study in findings.studies for part in _verdict(study)] or ["Nothing has been measured."],
        "Problems": [sources.problems(findings) or NO_PROBLEMS],
        "Certificates": [sources.certificates(findings, place) for place in findings.environments.values()],
        "Accuracy": [quality.by_checkpoint(study, findings) for study in findings.studies],
        "Length and position": _each(text, quality.by_length),
        "Recall hits in text": _each(text, quality.by_distance),
        "Recall tasks": _each(recall, quality.recall),
        "Costs": [part for place in findings.environments.values() for part in _costs(findings, place)],
        "Four clocks": clocks.plots(findings),
        "Pareto fronts": _each(findings.studies, verdict.fronts),
        "Attention maps": maps.pictures(findings),
        "Study": study.tables(findings.by_kind.get("training", [])),
        "Environments": [sources.environments(findings), sources.data_sets(findings), sources.commands(findings)],
    }
    return {title: parts for title, found in sections.items() if (parts := _present(found))}


def _present(found: Iterable[Any]) -> list[Part]:
    """The parts that there are; bare text becomes a paragraph."""
    return [Words("paragraph", part) if isinstance(part, str) else part for part in found if part is not None]


def _each(studies: Iterable[Study], make: Callable[[Study], list[Any]]) -> list[Any]:
    return [part for study in studies for part in make(study)]


def _verdict(study: Study) -> list[Any]:
    return [Words("heading", study.title), Words("verdict", verdict.summary(study)), *verdict.tables(study)]


def _costs(findings: Findings, place: str) -> list[Any]:
    """Costs in one environment."""
    of = findings.costs[findings.costs["place"] == place]
    if of.empty:
        return []
    crossed = costs.crossovers(findings, of, place)
    heading = [Words("heading", f"In {place}")] if findings.costs["place"].nunique() > 1 else []
    return [*heading, costs.exponents(findings, of, place), crossed, *costs.by_length(findings, of, place)]


def _uri(content: bytes | str, kind: str) -> str:
    """A picture or a file within the page."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _breakable(text: str) -> Markup:
    """Text with places at which a long name may go on in the next line."""
    return Markup(re.sub(r"(?<=\w)(?=[(\[])|(?<=[/,_=])(?=\w)", "<wbr>", str(escape(text))))


def _runs(parts: Iterable[Part]) -> list[tuple[bool, list[Part]]]:
    """Parts in their order: pictures that follow each other are shown side by side."""
    return [(side, list(of)) for side, of in itertools.groupby(parts, lambda part: part.kind == "plot")]


PAGES.filters |= {"runs": _runs, "uri": _uri, "breakable": _breakable, "markdown": markdown}
