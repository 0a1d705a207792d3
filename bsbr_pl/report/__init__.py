"""The report: one HTML file that needs nothing else, the same in Markdown, tables as CSV, plots as pictures.

`write_report` is a function of rows alone (bsbr_pl.results describes them): no torch, no checkpoint, no data.
"""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from bsbr_pl.results import Row
from bsbr_pl.utils.files import write_whole

from . import clocks, costs, latex, leaderboard, quality, sources, study, verdict
from .budgets import warned, warnings
from .labels import look
from .plots import Picture
from .studies import Findings
from .tables import WORDS, Table, markdown

__all__ = ["warnings", "write_latex", "write_report"]

BOARD, FIRST, PROBLEMS = "Leaderboard", "Verdict", "Problems"  # sections; the second is not folded


class Words(NamedTuple):
    """A `heading`, a `verdict` or a `paragraph`."""

    kind: str
    text: str


Part = Words | Table | Picture


def write_report(rows: Iterable[Row], folder: Path) -> Path:
    """Write report.html, report.md, tables/ and plots/ into `folder`; the same rows give the same bytes.

    Args:
        rows: as `bsbr_pl.results` reads and checks them.

    Returns:
        the path of report.html.

    Raises:
        OSError: naming the file that cannot be written.
    """
    findings = Findings(rows)
    sections = contents(findings)
    for part in itertools.chain(*sections.values()):
        if isinstance(part, Table):
            write_whole(folder / "tables" / f"{part.name}.csv", part.to_csv().encode())
        elif isinstance(part, Picture):
            write_whole(folder / "plots" / part.file, part.content)
    architectures = sorted({c.architecture for c in findings.checkpoints.values()})
    page = {"title": WORDS["title"], "lead": WORDS["lead"], "warnings": warned(findings), "sections": sections,
            "first": FIRST, "open": (BOARD, PROBLEMS), "architectures": architectures}  # fmt: skip
    for name in ("report.md", "report.html"):
        write_whole(folder / name, PAGES.get_template(name).render(page).encode())
    return folder / "report.html"


def write_latex(rows: Iterable[Row], folder: Path) -> Path:
    """Write the tables (booktabs) and the figures (PDF, 3.25 inches wide) of a paper into `folder`.

    Returns:
        the path of all.tex, which shows them all.

    Raises:
        OSError: naming the file that cannot be written.
    """
    return latex.write(itertools.chain(*contents(Findings(rows)).values()), folder)


def contents(findings: Findings) -> dict[str, list[Part]]:
    """The parts of the report by section; a section without content is left out."""
    shared = [f"{verb} with {part}" for verb, part in zip(("begin", "end"), findings.shared, strict=True) if part]
    found: dict[str, list[Any]] = {
        BOARD: leaderboard.tables(findings),
        FIRST: [] if findings.studies else [WORDS["nothing"]],
        PROBLEMS: [sources.problems(findings) or WORDS["no_problems"]],
        "Certificates": [],
        "Accuracy": [],
        "Length and position": [],
        "Recall hits in text": [],
        "Recall tasks": leaderboard.needle_maps(findings),
        "Costs": [],
        "Four clocks": clocks.plots(findings),
        "Decode state": [],
        "Attention maps": sources.maps(findings),
        "Study": study.tables([*findings.of("training").values(), *findings.of("certificate").values()]),
        "Environments": [sources.environments(findings), sources.data_sets(findings), sources.commands(findings)],
    }
    if shared:
        words = f"All paths of checkpoints {' and '.join(shared)}, which is left out above."
        found["Environments"].insert(0, words)
    for one in findings.studies:
        words = f"{verdict.summary(one)} {verdict.unlearned(one, findings)}".strip()
        found[FIRST] += [Words("heading", one.title), Words("verdict", words), verdict.picture(one)]
        found[FIRST].append(verdict.first(one))
        if background := verdict.background(one):
            found[FIRST].append(Words("background", background))
        found[FIRST].append(verdict.ranking(one))
        found["Accuracy"].append(quality.by_checkpoint(one, findings))
        found["Decode state"].append(verdict.state_picture(one))
        if one.recall:
            found["Recall tasks"] += quality.recall(one)
        else:
            found["Length and position"] += quality.by_length(one)
            found["Recall hits in text"] += quality.by_distance(one)
    for environment in findings.environments:
        found["Certificates"].append(sources.certificates(findings, environment))
        found["Costs"] += costs.of_environment(findings, environment)
    sections: dict[str, list[Part]] = {}
    for title, parts in found.items():
        for part in parts:
            if part:
                shown = Words("paragraph", part) if isinstance(part, str) else part
                sections.setdefault(title, []).append(shown)
    return sections


def _runs(parts: Iterable[Part]) -> list[tuple[bool, list[Part]]]:
    """Whether they are pictures, and the parts: consecutive pictures are shown side by side."""
    groups = itertools.groupby(parts, lambda part: part.kind == "picture")
    return [(are_pictures, list(group)) for are_pictures, group in groups]


def _inline(svg: bytes | str) -> Markup:
    """An SVG as a part of the page."""
    text = svg.decode() if isinstance(svg, bytes) else svg
    return Markup(text.replace(' xmlns="http://www.w3.org/2000/svg"', ""))


def _slug(title: str) -> str:
    """The id of a section."""
    return title.lower().replace(" ", "-")


def _colour(architecture: str) -> str:
    return look(architecture)[0]


def _breakable(text: str) -> Markup:
    """Text with places at which a long name may go on in the next line."""
    return Markup(re.sub(r"(?<=\w)(?=[(\[])|(?<=[/,_=])(?=\w)", "<wbr>", str(escape(text))))


PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=jinja2.select_autoescape(),
                           trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
PAGES.filters |= {"runs": _runs, "inline": _inline, "breakable": _breakable}
PAGES.filters |= {"markdown": markdown, "colour": _colour, "slug": _slug}
