"""Plots of the report. The same numbers give the same bytes; an architecture looks the same in all of them."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from .figures import front
from .labels import styles
from .tables import WORDS, Measured

SETTINGS: Any = {
    **{"svg.hashsalt": "bsbr_pl", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9.5},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.4", "axes.grid": True},
    **{"grid.color": "0.9", "lines.linewidth": 1.6, "lines.markersize": 5, "legend.frameon": False},
}
NOTHING: Mapping[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
MOST_TICKS = 8  # lengths that are all marked on an axis


@dataclass
class Picture:
    """A picture, the name of its file, and what it shows."""

    name: str
    title: str
    caption: str
    format: str  # png or svg
    content: bytes
    figure: Figure | None = None
    kind = "picture"

    @property
    def file(self) -> str:
        return f"{self.name}.{self.format}"


class Plot:
    """A figure of words.toml.

    Args:
        key: of the plot in words.toml.
        place: the end of the file's name.
        facts: what {names} in its title, caption and axes stand for.
    """

    def __init__(self, key: str, place: str, /, **facts: Any) -> None:
        self.words = {name: text.format(**facts) for name, text in WORDS["plots"][key].items()}
        self.name = f"{key}_{place}"
        self.figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()

    def picture(self) -> Picture:
        """With the axes' names; below them the legend, each name once, in as many columns as fit, and room for it."""
        self.axes.set(xlabel=self.words["x"], ylabel=self.words["y"])
        handles = dict(zip(*reversed(self.axes.get_legend_handles_labels()), strict=True))
        names = ["\n".join(textwrap.wrap(ascii(name)[1:-1], 68)) for name in handles]
        width = self.figure.get_figwidth() * 12  # letters
        columns = max(1, min(len(names), int(width // (max(map(len, names), default=1) + 6))))
        lines = sum(name.count("\n") + 1 for name in names)
        self.figure.set_figheight(self.figure.get_figheight() + 0.2 * -(-lines // columns))
        place: Any = {"loc": "outside lower center", "ncols": columns, "fontsize": 8.5}
        self.figure.legend(list(handles.values()), names, **place)
        title, caption = self.words["title"], self.words["caption"]
        return Picture(self.name, title, caption, "svg", drawn(self.figure, "svg"), self.figure)


def drawn(figure: Figure, form: str) -> bytes:
    """The figure as `png` or `svg`, without a date or a version in it."""
    stream = io.BytesIO()
    with rc_context(SETTINGS):
        figure.savefig(stream, format=form, dpi=144, metadata=NOTHING[form])
    return stream.getvalue()


def _plain(value: float, _: float = 0) -> str:
    return f"{value:,.10g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"


def _logarithmic(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """With plain numbers at `ticks`, or at 1, 3, 10, 30, ..."""
    axis.axes.set(**{"xscale" if axis is axis.axes.xaxis else "yscale": "log"})
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)) if ticks is None else FixedLocator(list(ticks)))
    axis.set_major_formatter(_plain)


def curves(
    key: str, place: str, lines: pd.DataFrame, /, scale: float = 1, log_y: bool = False, **facts: Any
) -> Picture | None:
    """A line with its interval for each row of a frame of figures, by label; None for a single column.

    Args:
        lines: a column for each x: numbers on a logarithmic axis, words in their order.
        scale: y is shown times this.
    """
    lines = lines.dropna(how="all").dropna(how="all", axis=1)
    at = list(lines.columns)
    if len(at) < 2:
        return None
    words = any(isinstance(x, str) for x in at)
    with rc_context(SETTINGS):
        plot = Plot(key, place, **facts)
        looks = styles(lines.index)
        for label, points in lines.iterrows():
            points = points.dropna().map(lambda point: point.times(scale))
            xs = [at.index(x) if words else x for x in points.index]
            low, high = zip(*points.map(lambda point: point.bounds), strict=True)
            plot.axes.fill_between(xs, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
            plot.axes.plot(xs, points.map(lambda point: point.value), label=label, **looks[label])
        if words:
            plot.axes.set_xticks(range(len(at)), [ascii(x)[1:-1] for x in at], rotation=20, ha="right")
        else:
            _logarithmic(plot.axes.xaxis, sorted(at) if len(at) <= MOST_TICKS else [2**i for i in range(0, 24, 2)])
            plot.axes.set_xlim(min(at) / 1.15, max(at) * 1.15)
        if log_y:
            _logarithmic(plot.axes.yaxis)
        return plot.picture()


def courses(key: str, place: str, lines: pd.DataFrame, x: str, /, **facts: Any) -> Picture:
    """A line for each run, both axes linear; runs of one label are drawn alike.

    Args:
        lines: a row for each run: `label`, and the lists `x` and `value`.
    """
    with rc_context(SETTINGS):
        plot = Plot(key, place, **facts)
        looks = styles(lines["label"])
        for label, xs, ys in zip(lines["label"], lines[x], lines["value"], strict=True):
            plot.axes.plot(xs, ys, label=label, **looks[label] | {"markersize": 3.5})
        plot.axes.xaxis.set_major_formatter(_plain)
        return plot.picture()


def pareto(
    key: str, place: str, points: Mapping[str, tuple[float, Measured]], worse: int, /, **facts: Any
) -> Picture | None:
    """One point for each label; a line joins those that no other beats on both axes. Less of x is better.

    Args:
        points: label -> x, and the figure y.
        worse: the sign of worse y.
    """
    if len(points) < 2:
        return None
    best = front({label: (x, worse * figure.value) for label, (x, figure) in points.items()})
    with rc_context(SETTINGS):
        plot = Plot(key, place, front=", ".join(best), **facts)
        looks = styles(points)
        plot.axes.plot([points[n][0] for n in best], [points[n][1].value for n in best], color="0.6", zorder=1, ls="--")
        for label, (x, figure) in points.items():
            low, high = figure.bounds
            spread = [[max(0.0, figure.value - low)], [max(0.0, high - figure.value)]]
            look = looks[label] | {"linestyle": "none", "markersize": 8}
            plot.axes.errorbar([x], [figure.value], yerr=spread, label=label, elinewidth=1, **look)
            if label in best:
                plot.axes.scatter([x], [figure.value], s=190, facecolors="none", edgecolors="0.45", zorder=1)
        xs = [x for x, _ in points.values()]
        if max(xs) > 4 * min(xs) > 0:
            _logarithmic(plot.axes.xaxis)
        plot.axes.margins(0.12)
        return plot.picture()
