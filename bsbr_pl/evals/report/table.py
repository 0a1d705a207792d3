"""A table: columns with units, cells with intervals, written as CSV, Markdown and HTML."""

import csv
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SCALES = {"ms": 1e3, "%": 100.0, "MB": 1e-6, "GFLOP": 1e-9}  # of units in headers; cells hold s, shares, bytes, FLOP


@dataclass(frozen=True)
class Measured:
    """A number, the interval around it where there is one, and a word to add."""

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""

    def times(self, scale: float) -> "Measured":
        low, high = (None if bound is None else scale * bound for bound in (self.low, self.high))
        return Measured(scale * self.value, low, high, self.note)


Cell = str | int | float | Measured | None  # None: not measured


@dataclass(frozen=True)
class Column:
    """A column: name, unit, which value is best (`low` or `high`), whether it is a difference, and fixed decimals."""

    name: str
    unit: str = ""
    best: str = ""
    signed: bool = False
    decimals: int | None = None

    @property
    def header(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def scaled(self, value: float) -> float:
        return value * SCALES.get(self.unit, 1)

    def number(self, value: float, like: float | None = None) -> str:
        """Four digits, or all before the decimal point; with the decimals of another number if one is given."""
        value, like = self.scaled(value), self.scaled(value if like is None else like)
        like = float(f"{like:.4g}")  # so that 0.99999 is 1.000
        decimals, sign = self.decimals, "+" if self.signed else ""
        if decimals is None:
            decimals = 0 if like == 0 or isinstance(value, int) else max(0, 3 - math.floor(math.log10(abs(like))))
        if decimals > 8:
            return f"{value:{sign}.2e}"
        return f"{round(value, decimals) + 0.0:{sign},.{decimals}f}" if value else "0"  # + 0.0: never -0

    def parts(self, cell: Cell) -> tuple[str, str, str]:
        """A cell as it is shown: value, interval, note."""
        if cell is None or isinstance(cell, str):
            return cell or "", "", ""
        if not isinstance(cell, Measured):
            return self.number(cell), "", ""
        if cell.low is None or cell.high is None or cell.low == cell.high:
            return self.number(cell.value), "", cell.note
        low, high = (self.number(bound, cell.value) for bound in (cell.low, cell.high))
        return self.number(cell.value), f"[{low}, {high}]", cell.note


@dataclass
class Table:
    """A table and all that is needed to write it down.

    Args:
        name: of its file; letters, digits, `_` and `-`.
        title: what it shows.
        caption: how to read it, and where its numbers are from.
        columns: of every row; the first names the row.
        rows: cells.
        ranked: rows, from the first, among which the best are marked; all where None.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    ranked: int | None = None

    def best(self, row: int, column: int) -> bool:
        """Whether a cell holds the best value of its column."""
        of = self.columns[column].best
        values = [_value(cells[column]) for cells in self.rows[: self.ranked]]
        known = {value for value in values if value is not None}
        if not of or row >= len(values) or len(known) < 2:
            return False
        return values[row] == (min(known) if of == "low" else max(known))

    def to_csv(self) -> str:
        """Every digit, intervals and notes in columns of their own, in the units of the headers."""
        written = []
        for i, column in enumerate(self.columns):
            cells = [row[i] for row in self.rows]
            scaled = [column.scaled(value) if (value := _value(cell)) is not None else cell or "" for cell in cells]
            written.append([column.header, *scaled])
            for part in ("low", "high", "note"):
                parts = [getattr(cell, part, None) for cell in cells]
                if any(part not in (None, "") for part in parts):
                    scaled = [column.scaled(part) if isinstance(part, int | float) else part or "" for part in parts]
                    written.append([f"{column.header}, {part}", *scaled])
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(zip(*written, strict=True))
        return stream.getvalue()

    def to_markdown(self) -> str:
        lines = [[markdown(column.header) for column in self.columns], ["---"] * len(self.columns)]
        for i, row in enumerate(self.rows):
            shown = [
                [markdown(part) for part in column.parts(cell)] for column, cell in zip(self.columns, row, strict=True)
            ]
            for j, parts in enumerate(shown):
                parts[0] = f"**{parts[0]}**" if self.best(i, j) else parts[0]
            lines.append([" ".join(part for part in parts if part) for parts in shown])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def to_html(self) -> str:
        """Headers are buttons that sort; rows that are not ranked keep to the end."""
        head = ""
        for i, column in enumerate(self.columns):
            kind = "" if any(isinstance(row[i], str) for row in self.rows) else ' class="number"'
            unit = f' <span class="unit">({html.escape(column.unit)})</span>' if column.unit else ""
            head += f'<th scope="col"{kind}><button type="button">{html.escape(column.name)}{unit}</button></th>'
        every, ranked = range(len(self.rows)), len(self.rows[: self.ranked])
        bodies = every[:ranked], every[ranked:]
        filled = "".join(
            f"<tbody{kind}>{''.join(map(self._html_row, rows))}</tbody>\n"
            for kind, rows in zip(("", ' class="unranked"'), bodies, strict=True)
            if rows
        )
        return f"<table><thead><tr>{head}</tr></thead>\n{filled}</table>"

    def _html_row(self, i: int) -> str:
        cells = []
        for j, (column, cell) in enumerate(zip(self.columns, self.rows[i], strict=True)):
            value, spread, note = map(html.escape, column.parts(cell))
            shown = f"<strong>{value}</strong>" if self.best(i, j) else value
            shown = (
                re.sub(r"(?<=\w)(?=[(\[])|(?<=[/,_=])(?=\w)", "<wbr>", shown) if j == 0 else shown
            )  # where to break a name
            shown += f" <small>{spread}</small>" if spread else ""
            shown += f" <em>{note}</em>" if note else ""
            number = _value(cell)
            key = value if number is None else repr(float(number))
            kind = "text" if isinstance(cell, str) else "number"
            tag = 'th scope="row"' if j == 0 else f'td class="{kind}"'
            cells.append(f'<{tag} data-sort="{key}">{shown}</{tag[:2]}>')
        return f"<tr>{''.join(cells)}</tr>\n"


#: A column, and what reads its cell from an item that has a row.
Columns = Sequence[tuple[Column, Callable[[Any], Cell]]]
ARCHITECTURE = Column("architecture")


def tabulate(
    name: str, title: str, caption: str, items: Sequence[Any], columns: Columns, ranked: int | None = None
) -> Table | None:
    """A row for each item; rows with nothing but a name are left out, and so are columns without any value."""
    rows = [[read(item) for _, read in columns] for item in items]
    full = [any(cell is not None for cell in row[1:]) for row in rows]
    ranked = None if ranked is None else sum(full[:ranked])
    rows = [row for row, keep in zip(rows, full, strict=True) if keep]
    kept = [i for i in range(len(columns)) if any(row[i] not in (None, "") for row in rows)]
    shown = [columns[i][0] for i in kept]
    return Table(name, title, caption, shown, [[row[i] for i in kept] for row in rows], ranked) if rows else None


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(text.split()))


def _value(cell: Cell) -> float | None:
    found = cell.value if isinstance(cell, Measured) else cell
    return found if isinstance(found, int | float) and math.isfinite(found) else None
