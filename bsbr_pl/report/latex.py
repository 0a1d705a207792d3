"""Tables and figures for a paper: booktabs, and PDF with TrueType fonts in the width of a column."""

import re
from collections.abc import Iterable
from pathlib import Path

from bsbr_pl.utils.files import write_whole

from .plots import PAPER, Picture, drawn
from .tables import WORDS, Column, Shown, Table

SPECIAL = {**{letter: f"\\{letter}" for letter in "#$%&_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
SPECIAL |= {"^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}
DOCUMENT = r"""\documentclass[twocolumn]{article}
\usepackage{booktabs,graphicx}
\begin{document}
%s\end{document}
"""
FLOAT = "\\begin{%s}\n\\centering\n%s\n\\caption{%s}\n\\end{%s}\n"
MOST_FLOATS = 12  # before they are put on pages; LaTeX holds at least 18 back


def write(parts: Iterable[object], folder: Path) -> Path:
    """Write the tables that words.toml marks with `paper`, the figures, and all.tex, which shows them.

    Returns:
        the path of all.tex.
    """
    shown = []
    for part in parts:
        if isinstance(part, Table) and WORDS["tables"][part.key].get("paper"):
            write_whole(folder / f"{part.name}.tex", tabular(part).encode())
            shown.append(FLOAT % ("table*", f"\\input{{{part.name}}}", escaped(part.title), "table*"))
        elif isinstance(part, Picture) and part.figure:
            write_whole(folder / f"{part.name}.pdf", drawn(part.figure, "pdf", PAPER))
            picture = f"\\includegraphics[width=\\linewidth]{{{part.name}}}"
            shown.append(FLOAT % ("figure", picture, escaped(part.title), "figure"))
    pages = ["".join(shown[i : i + MOST_FLOATS]) for i in range(0, len(shown), MOST_FLOATS)]
    write_whole(folder / "all.tex", (DOCUMENT % "\\clearpage\n".join(pages)).encode())
    return folder / "all.tex"


def tabular(table: Table) -> str:
    """A table, shrunk to the width of its float, a column or (`table*`) a page, if it is wider; the best are bold."""
    alignment = ""
    for cells in zip(*table.grid, strict=True):
        is_text = all(cell.text or not cell.value for cell in cells)
        alignment += "l" if is_text else "r"
    header = " & ".join(map(_header, table.columns)) + " \\\\"
    rows = [" & ".join(map(_cell, row)) + " \\\\" for row in table.grid]
    lines = ["\\begin{tabular}{@{}" + alignment + "@{}}", "\\toprule", header, "\\midrule"]
    lines += [*rows, "\\bottomrule", "\\end{tabular}}%"]
    wide = "\\ifdim\\wd0>\\linewidth\\resizebox{\\linewidth}{!}{\\usebox0}\\else\\usebox0\\fi\\endgroup"
    return "\n".join(["\\begingroup\\footnotesize\\setlength{\\tabcolsep}{4pt}%", "\\sbox0{%", *lines, wide, ""])


def _header(column: Column) -> str:
    return escaped(column.header) + (f" {{\\scriptsize [{escaped(column.interval)}]}}" if column.interval else "")


def _cell(cell: Shown) -> str:
    value = escaped(cell.value) if cell.text else re.sub("^-", "$-$", cell.value)
    value = f"\\textbf{{{value}}}" if cell.best else value
    return value + "".join(f" {{\\scriptsize {escaped(more)}}}" for more in (cell.interval, cell.note) if more)


def escaped(text: str) -> str:
    """Text that LaTeX shows as it is, in ASCII: other letters as `\\u4e2d`."""
    plain = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return "".join(SPECIAL.get(letter, letter) for letter in plain)
