"""Tables: a frame of cells under columns with units, written as CSV, Markdown and HTML. words.toml describes them."""

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

WORDS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
SCALES = {"ms": 1e3, "%": 100.0, "MB": 1e-6, "GFLOP": 1e-9}  # of units in headers; cells hold s, shares, bytes, FLOP


@dataclass(frozen=True)
class Measured:
    """A number, the interval around it if there is one, a word to add, and the runs behind it in words."""

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    runs: tuple[str, ...] = ()

    def times(self, scale: float) -> "Measured":
        low = None if self.low is None else scale * self.low
        high = None if self.high is None else scale * self.high
        return Measured(scale * self.value, low, high, self.note)

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of the interval; the value again if there is none."""
        return (self.value, self.value) if self.low is None or self.high is None else (self.low, self.high)


Cell = str | int | float | Measured | None  # None: not measured


@dataclass(frozen=True)
class Column:
    """A column of a table, as words.toml describes it; `interval` names the intervals in its cells."""

    name: str
    unit: str = ""
    best: str = ""
    ties: bool = False  # whether all whose intervals overlap with that of the best are marked
    signed: bool = False
    decimals: int | None = None
    key: Any = None
    interval: str = ""

    @property
    def header(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def scaled(self, value: Any) -> Any:
        """A number in the column's unit; anything else as it is."""
        return value * SCALES.get(self.unit, 1) if isinstance(value, Real) else value

    def number(self, value: float, like: float | None = None) -> str:
        """Four digits, or all before the decimal point; with the decimals of another number if one is given."""
        value, like = self.scaled(value), self.scaled(value if like is None else like)
        like = float(f"{like:.4g}")  # so that 0.99999 is 1.000
        decimals, sign = self.decimals, "+" if self.signed else ""
        if decimals is None:
            whole = like == 0 or isinstance(value, Integral)
            decimals = 0 if whole else max(0, 3 - math.floor(math.log10(abs(like))))
        if decimals > 8:
            return f"{value:{sign}.2e}"
        return f"{round(value, decimals) + 0.0:{sign},.{decimals}f}" if value else "0"  # + 0.0: never -0

    def parts(self, cell: Cell) -> tuple[str, str, str]:
        """A cell as it is shown: value, interval, note."""
        if cell is None or isinstance(cell, str):
            return cell or "", "", ""
        if not isinstance(cell, Measured):
            return self.number(cell), "", ""
        low, high = cell.bounds
        interval = f"[{self.number(low, cell.value)}, {self.number(high, cell.value)}]" if low != high else ""
        return self.number(cell.value), interval, cell.note


class Shown(NamedTuple):
    """A cell of a page."""

    value: str
    interval: str
    note: str
    best: bool
    text: bool  # no number
    key: str  # its number with six digits in the column's unit, by which rows are sorted; "" if `value` is the same
    runs: Sequence[str]  # that a click shows


@dataclass
class Table:
    """A table with its texts.

    Args:
        name: of its file; letters, digits, `_` and `-`.
        title: what it shows.
        caption: how to read it, and where its numbers are from.
        columns: the first names the row.
        frame: a column of cells for each of `columns`, by its header.
        ranked: rows, from the first, among which the best are marked.
        folded: whether the page hides it until a click.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    frame: pd.DataFrame
    ranked: int
    folded: bool = False
    key: str = ""  # in words.toml
    kind = "table"

    def to_csv(self) -> str:
        """Every digit, intervals and notes in columns of their own, in the units of the headers."""
        written = {}
        for column in self.columns:
            cells = self.frame[column.header]
            written[column.header] = [column.scaled(_value(cell)) for cell in cells]
            for part in ("low", "high", "note"):
                found = [column.scaled(getattr(cell, part, None)) for cell in cells]
                if any(value not in (None, "") for value in found):
                    written[f"{column.header}, {part}"] = found
        return pd.DataFrame(written, dtype=object).to_csv(index=False, lineterminator="\n")

    @cached_property
    def grid(self) -> list[list[Shown]]:
        """Every row as it is shown."""
        columns = [self._shown(column, self.frame[column.header]) for column in self.columns]
        return [list(row) for row in zip(*columns, strict=True)]

    def _shown(self, column: Column, cells: pd.Series) -> list[Shown]:
        best, shown = _best(column, cells[: self.ranked]), list[Shown]()
        for i, cell in enumerate(cells):
            text, interval, note = column.parts(cell)
            value = _value(cell)
            key = f"{column.scaled(value):.6g}" if isinstance(value, Real) else ""
            if key == text.replace(",", ""):
                key = ""
            runs = cell.runs if isinstance(cell, Measured) else ()
            shown.append(Shown(text, interval, note, i in best, isinstance(cell, str), key, runs))
        return shown

    def to_markdown(self) -> str:
        frame = pd.DataFrame(self.grid, columns=self.frame.columns, dtype=object).map(_marked)
        names = [f"{c.header} [{c.interval}]" if c.interval else c.header for c in self.columns]
        return pipes(frame.set_axis(list(map(markdown, names)), axis=1))


def _best(column: Column, cells: pd.Series) -> set[int]:
    """The places of the best cells; none if all are equal."""
    values = {i: _value(cell) for i, cell in enumerate(cells)}
    known = {i: value for i, value in values.items() if isinstance(value, Real)}
    if not column.best or len(set(known.values())) < 2:
        return set()
    best = min(known.values()) if column.best == "low" else max(known.values())
    found = {i for i in known if known[i] == best}
    if column.ties:
        low, high = cells[min(found)].bounds
        for i in known:
            least, most = cells[i].bounds
            if least <= high and low <= most:
                found.add(i)
    return found


def _value(cell: Cell) -> Any:
    return cell.value if isinstance(cell, Measured) else cell


def _marked(cell: Shown) -> str:
    value = f"**{markdown(cell.value)}**" if cell.best else markdown(cell.value)
    return f"{value} {markdown(f'{cell.interval} {cell.note}')}".strip()


def pipes(frame: pd.DataFrame) -> str:
    """A frame of text as a Markdown table."""
    header = f"| {' | '.join(frame.columns)} |"
    rows = [f"| {' | '.join(row)} |" for row in frame.itertuples(index=False, name=None)]
    return "\n".join([header, "|---" * len(frame.columns) + "|", *rows, ""])


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", " ".join(text.split()))


def _column(words: Mapping[str, Any], facts: Mapping[str, Any]) -> Column:
    texts = {name: words.get(name, "").format(**facts) for name in ("name", "interval")}
    return Column(**{**words, **texts})


def table(
    key: str, suffix: str, frame: pd.DataFrame, /, more: Iterable[Column] = (), ranked: int | None = None, **facts: Any
) -> Table | None:
    """A table of words.toml, without empty columns, and without rows that hold nothing but their name.

    Args:
        key: of the table in words.toml.
        suffix: the end of the file's name: which environment, data, split.
        frame: cells; its columns have the keys or names of the table's columns.
        more: the columns that "*" stands for.
        ranked: rows, from the first, that are ranked; all if None.
        facts: the values of {names} in the title, the caption and the columns.
    """
    words = WORDS["tables"][key]
    columns: list[Column] = []
    for column in words["columns"]:
        columns += more if column == "*" else [_column(column, facts)]
    found = {}
    for column in columns:
        source = column.name if column.key is None else column.key
        if source in frame:
            cells = frame[source].astype(object)
            found[column.header] = cells.where(cells.notna(), None)
    shown = pd.DataFrame(found, dtype=object)
    full = shown.iloc[:, 1:].notna().any(axis=1)
    if not full.any():
        return None
    kept = shown[full].replace("", None).notna().any()
    return Table(
        name=f"{key}_{suffix}" if suffix else key,
        title=words["title"].format(**facts),
        caption=words["caption"].format(**facts),
        columns=[column for column in columns if kept.get(column.header)],
        frame=shown.loc[full, kept].reset_index(drop=True),
        ranked=int(full[:ranked].sum()),
        folded=words.get("folded", False),
        key=key,
    )
