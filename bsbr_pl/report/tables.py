"""Tables: a frame of cells under columns with units, written as CSV, Markdown and HTML."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

SCALES = {"ms": 1e3, "%": 100.0, "MB": 1e-6, "GFLOP": 1e-9}  # of units in headers; cells hold s, shares, bytes, FLOP


@dataclass(frozen=True)
class Measured:
    """A number, the interval around it if there is one, and a word to add."""

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
    """A column of a table.

    Args:
        name: shown above it.
        unit: of the numbers shown; cells hold base units.
        best: which value is marked: `low`, `high`, or none.
        signed: whether numbers are differences.
        decimals: fixed, instead of four digits.
        key: the frame's column, if it is not `name`.
    """

    name: str
    unit: str = ""
    best: str = ""
    signed: bool = False
    decimals: int | None = None
    key: Any = None

    @property
    def source(self) -> Any:
        return self.name if self.key is None else self.key

    @property
    def header(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def scaled(self, value: Any) -> Any:
        """A number in the column's unit; anything else as it is."""
        return value * SCALES.get(self.unit, 1) if isinstance(value, int | float) else value

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
        return (
            self.number(cell.value),
            f"[{self.number(cell.low, cell.value)}, {self.number(cell.high, cell.value)}]",
            cell.note,
        )


class Shown(NamedTuple):
    """A cell of a page."""

    value: str
    interval: str
    note: str
    best: bool
    text: bool  # no number
    key: str  # that rows are sorted by


@dataclass
class Table:
    """A table and all that is needed to write it down.

    Args:
        name: of its file; letters, digits, `_` and `-`.
        title: what it shows.
        caption: how to read it, and where its numbers are from.
        columns: the first names the row.
        frame: a column of cells for each of `columns`, in their order.
        ranked: rows, from the first, among which the best are marked; all if None.
        folded: whether the page shows it only when asked to.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    frame: pd.DataFrame
    ranked: int | None = None
    folded: bool = False
    kind: str = "table"
    _best: list[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._best = [self._best_value(i) for i in range(len(self.columns))]

    def _best_value(self, place: int) -> float | None:
        """The value that is marked in a column; None if all are the same."""
        best = self.columns[place].best
        known = self.frame.iloc[: self.ranked, place].map(_value).dropna()
        if not best or known.nunique() < 2:
            return None
        return known.min() if best == "low" else known.max()

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds no text."""
        return [not self.frame.iloc[:, i].map(lambda cell: isinstance(cell, str)).any() for i in range(len(self.columns))]

    def to_csv(self) -> str:
        """Every digit, intervals and notes in columns of their own, in the units of the headers."""
        written: dict[str, pd.Series] = {}
        for i, column in enumerate(self.columns):
            cells = self.frame.iloc[:, i]
            written[column.header] = cells.map(lambda cell: getattr(cell, "value", cell)).map(column.scaled)
            for part in ("low", "high", "note"):
                found = cells.map(lambda cell, part=part: getattr(cell, part, None)).map(column.scaled)
                if found.replace("", None).notna().any():
                    written[f"{column.header}, {part}"] = found
        return pd.DataFrame(written, dtype=object).to_csv(index=False, lineterminator="\n")

    def rows(self) -> Iterator[list[Shown]]:
        """Every row as it is shown."""
        for i, cells in enumerate(self.frame.itertuples(index=False, name=None)):
            yield [self._shown(i, j, cell) for j, cell in enumerate(cells)]

    def bodies(self) -> list[tuple[bool, list[list[Shown]]]]:
        """The ranked rows, and the others, which keep to the end however rows are sorted."""
        rows = list(self.rows())
        ranked = len(rows[: self.ranked])
        return [(is_ranked, of) for is_ranked, of in ((True, rows[:ranked]), (False, rows[ranked:])) if of]

    def _shown(self, row: int, place: int, cell: Cell) -> Shown:
        parts, value = self.columns[place].parts(cell), _value(cell)
        ranked = self.ranked is None or row < self.ranked
        best = ranked and value is not None and value == self._best[place]
        return Shown(*parts, best, isinstance(cell, str), parts[0] if value is None else repr(float(value)))

    def to_markdown(self) -> str:
        written = []
        for row in self.rows():
            values = [f"**{markdown(cell.value)}**" if cell.best else markdown(cell.value) for cell in row]
            written.append([f"{v} {markdown(f'{c.interval} {c.note}')}".strip() for v, c in zip(values, row, strict=True)])
        return pipes(pd.DataFrame(written, columns=[markdown(column.header) for column in self.columns]))


def pipes(frame: pd.DataFrame) -> str:
    """A frame of text as a Markdown table."""
    lines = [list(frame.columns), *frame.itertuples(index=False, name=None)]
    header, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([header, "|---" * len(frame.columns) + "|", *rows]) + "\n"


def tabulate(
    name: str, title: str, caption: str, frame: pd.DataFrame, columns: Sequence[Column], ranked: int | None = None
) -> Table | None:
    """The columns that the frame has, without empty ones; without rows that hold nothing but their name.

    Args:
        frame: cells; by default its columns have the names of `columns`.
        ranked: rows, from the first, that are ranked.
    """
    columns = [column for column in columns if column.source in frame]
    cells = frame[[column.source for column in columns]].astype(object)
    cells = cells.where(cells.notna(), None).set_axis([column.header for column in columns], axis=1)
    full = cells.iloc[:, 1:].notna().any(axis=1).to_numpy()
    kept = cells.replace("", None)[full].notna().any().to_numpy()
    if not full.any():
        return None
    number = None if ranked is None else int(full[:ranked].sum())
    shown = [column for column, keep in zip(columns, kept, strict=True) if keep]
    return Table(name, title, caption, shown, cells.loc[full, kept].reset_index(drop=True), number)


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(text.split()))


def _value(cell: Cell) -> float | None:
    found = cell.value if isinstance(cell, Measured) else cell
    return found if isinstance(found, int | float) and math.isfinite(found) else None
