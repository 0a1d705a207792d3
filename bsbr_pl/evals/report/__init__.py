"""The report: one HTML file that needs nothing else, the same in Markdown, tables as CSV, plots as PNG and SVG."""

import base64
import html
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from bsbr_pl.utils.files import write_whole

from ..evaluation import Evaluation
from . import budgets, clocks, costs, maps, quality, sources, verdict
from .findings import Findings, Study
from .plot import Plot
from .table import Table, markdown

TITLE = "Attention architectures compared"
LEAD = (
    "Certified first, then compared: no figure of a model that sees the future is ranked, budgets are equal in every "
    "ranking, and nothing is averaged but seeds of finished runs. Every number names its environment (E) and "
    "command (C), listed at the end."
)
NO_PROBLEMS = "None: every checkpoint was read and measured, and every run finished."
TEMPLATE = Path(__file__).with_name("template.html")


@dataclass
class Heading:
    """A heading within a section."""

    text: str


@dataclass
class Verdict:
    """A paragraph that sums up."""

    text: str


Part = str | Heading | Verdict | Table | Plot


@dataclass
class Section:
    """A section of the report: paragraphs, tables and plots in order."""

    title: str
    parts: list[Part]

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Write report.html, report.md, tables/ and plots/ into `folder`; the same rows give the same bytes.

    Only rows of the evaluation's own checkpoints are read, whatever else the results hold.

    Returns:
        the path of report.html.
    """
    findings = Findings(evaluation)
    sections, warnings = contents(findings), budgets.warnings(findings)
    pictures: dict[str, bytes] = {}
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Table):
            write_whole(folder / "tables" / f"{part.name}.csv", part.to_csv().encode())
        elif isinstance(part, Plot):
            for kind in ("png", "svg"):
                pictures[f"{part.name}.{kind}"] = part.image(kind)
                write_whole(folder / "plots" / f"{part.name}.{kind}", pictures[f"{part.name}.{kind}"])
    write_whole(folder / "report.md", as_markdown(sections, warnings).encode())
    write_whole(folder / "report.html", as_html(sections, pictures, warnings).encode())
    return folder / "report.html"


def contents(findings: Findings) -> list[Section]:
    """Everything the report says; a section without content is left out."""
    studies = findings.studies
    text, recall = [study for study in studies if not study.recall], [study for study in studies if study.recall]

    def each(among: list[Study], *makes: Callable[[Study, Findings], object]) -> list[Part]:
        return present(make(study, findings) for study in among for make in makes)

    verdicts: list[Part] = []
    for study in studies:
        verdicts += [Heading(study.title), Verdict(verdict.summary(study))]
        verdicts += present([verdict.ranking(study, findings)])
    by_place: list[Part] = []
    for place in findings.costs:
        crossed = costs.crossovers(findings, place)
        by_place += [Heading(f"In {place}")] if len(findings.costs) > 1 else []
        by_place += present([costs.exponents(findings, place)])
        if crossed:
            by_place.append(". ".join(str(row[-1]) for row in crossed.rows if row[2] == "training pass") + ".")
        by_place += present([crossed, costs.cost_plots(findings, place)])
        by_place += present(costs.by_length(findings, place, which) for which in costs.COSTS)
    tables = (sources.environments, sources.data_sets, sources.commands)
    courses, unrecorded = clocks.plots(findings)
    pictures, unmapped = maps.plots(findings)
    sections = [
        Section("Verdict", verdicts or ["Nothing has been measured."]),
        Section(
            "Problems",
            [sources.problems(findings) or NO_PROBLEMS],
        ),
        Section("Certificates", present(sources.certificates(findings, e) for e in findings.environments.values())),
        Section("Accuracy", each(studies, quality.by_checkpoint)),
        Section("Length and position", each(text, quality.by_length, quality.length_plots)),
        Section("Recall hits in text", each(text, quality.by_distance, quality.hits_plots)),
        Section("Recall tasks", each(recall, quality.recall_plots, quality.recall, quality.routing)),
        Section("Costs", by_place),
        Section("Four clocks", [*courses, *([f"Not recorded: {unrecorded}."] if unrecorded else [])]),
        Section("Pareto fronts", each(studies, verdict.pareto_plots)),
        Section("Attention maps", [*pictures, *([f"Without a map: {'; '.join(unmapped)}."] if unmapped else [])]),
        Section("Environments", present(make(findings) for make in tables)),
    ]
    return [section for section in sections if section.parts]


def present(found: Iterable[object]) -> list[Any]:
    """Tables and plots, those in lists among them, without what there was nothing to make from."""
    parts = [part for one in found for part in (one if isinstance(one, list) else [one])]
    return [part for part in parts if part is not None]


def as_markdown(sections: Sequence[Section], warnings: Sequence[str] = ()) -> str:
    """Beside the plots and tables, which it links to; warnings come first."""
    lines = [f"# {TITLE}", *(f"**Warning:** {markdown(warning)}" for warning in warnings), LEAD]
    for section in sections:
        lines.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, Heading):
                lines.append(f"### {markdown(part.text)}")
            elif isinstance(part, Table):
                lines.append(f"**{markdown(part.title)}** ([CSV](tables/{part.name}.csv))  \n{markdown(part.caption)}")
                lines.append(part.to_markdown().rstrip())
            elif isinstance(part, Plot):
                lines.append(f"![{markdown(part.title)}](plots/{part.name}.png)")
                lines.append(f"**{markdown(part.title)}** {markdown(part.caption)}")
            else:
                lines.append(markdown(part.text if isinstance(part, Verdict) else part))
    return "\n\n".join(lines) + "\n"


def as_html(sections: Sequence[Section], pictures: Mapping[str, bytes], warnings: Sequence[str] = ()) -> str:
    """One page that holds everything: it loads nothing, and its only script sorts tables. Warnings come first."""
    items = [f'<li><a href="#{section.anchor}">{section.title}</a></li>' for section in sections]
    body = []
    for section in sections:
        body.append(f'<section aria-labelledby="{section.anchor}">\n<h2 id="{section.anchor}">{section.title}</h2>')
        for plots, parts in itertools.groupby(section.parts, lambda part: isinstance(part, Plot)):
            shown = [_html_part(part, pictures) for part in parts]
            body += ['<div class="plots">', *shown, "</div>"] if plots else shown
        body.append("</section>")
    warned = "\n".join(f'<p class="warning"><b>Warning:</b> {html.escape(warning)}</p>' for warning in warnings)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    listed, page = "\n".join(items), "\n".join(body)
    return template.substitute(title=TITLE, warnings=warned, lead=LEAD, contents=listed, body=page)


def _html_part(part: Part, pictures: Mapping[str, bytes]) -> str:
    if isinstance(part, Heading):
        return f"<h3>{html.escape(part.text)}</h3>"
    if isinstance(part, str | Verdict):
        shown, kind = (part, "") if isinstance(part, str) else (part.text, ' class="verdict"')
        return f"<p{kind}>{html.escape(shown)}</p>"
    title, caption = html.escape(part.title), html.escape(part.caption)
    if isinstance(part, Plot):
        kind = "png" if part.raster else "svg"
        source = _data("image/png" if part.raster else "image/svg+xml", pictures[f"{part.name}.{kind}"])
        return (
            f'<figure id="plot-{part.name}"><figcaption><b>{title}</b> {caption}</figcaption>'
            f'<img alt="{title}" src="{source}"></figure>'
        )
    link = _data("text/csv;charset=utf-8", part.to_csv().encode())
    return (
        f'<figure id="table-{part.name}"><figcaption><b>{title}</b> {caption} '
        f'<a download="{part.name}.csv" href="{link}">CSV</a></figcaption>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">{part.to_html()}</div></figure>'
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
