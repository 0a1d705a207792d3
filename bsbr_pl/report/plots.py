"""Plots of the report. The same numbers give the same bytes; an architecture looks the same in all of them."""

import io
import math
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
from .tables import Measured

SETTINGS: Any = {
    "svg.hashsalt": "bsbr_pl",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "grid.color": "0.9",
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
}
NOTHING: Mapping[str, Any] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


@dataclass
class Picture:
    """A PNG that a row holds, the name of its file, and what it shows."""

    name: str
    title: str
    caption: str
    png: bytes
    kind = "plot"
    shown_as, media = "png", "image/png"

    def image(self, kind: str) -> bytes:
        return self.png


@dataclass
class Plot:
    """A figure, the name of its files, and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure
    kind = "plot"
    shown_as, media = "svg", "image/svg+xml"

    def image(self, kind: str) -> bytes:
        """The figure as `png` or `svg`, without a date or a version in it."""
        stream = io.BytesIO()
        with rc_context(SETTINGS):
            self.figure.savefig(stream, format=kind, dpi=120, metadata=NOTHING[kind])
        return stream.getvalue()


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.3), layout="constrained")
    return figure, figure.add_subplot()


def _plain(value: float, _: float = 0) -> str:
    return f"{value:,.10g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"


def _name(figure: Figure, axes: Axes, x: str, y: str) -> None:
    """The axes' names; below them the legend, each name once, in as many columns as fit, and room for it."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = ["\n".join(textwrap.wrap(ascii(name)[1:-1], 68)) for name in handles]
    width = figure.get_figwidth() * 12  # letters
    columns = max(1, min(len(names), int(width // (max(map(len, names), default=1) + 6))))
    lines = sum(name.count("\n") + 1 for name in names)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-lines // columns))
    figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, fontsize=8.5)


def _logarithmic(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """With plain numbers at `ticks`, or at 1, 3, 10, 30, ..."""
    axis.axes.set(**{"xscale" if axis is axis.axes.xaxis else "yscale": "log"})
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(LogLocator(10, subs=(1.0, 3.0)) if ticks is None else FixedLocator(list(ticks)))
    axis.set_major_formatter(_plain)


def curves(
    name: str, title: str, caption: str, lines: pd.DataFrame, x: str, y: str, log_y: bool = False, scale: float = 1.0
) -> Plot | None:
    """A line with its interval for each row of a frame of figures, by label.

    Args:
        lines: a column for each x: numbers on a logarithmic axis, words in their order.
        scale: y is shown times this.
    """
    lines = lines.dropna(how="all").dropna(how="all", axis=1)
    places = list(lines.columns)
    if not places:
        return None
    words = any(isinstance(place, str) for place in places)
    with rc_context(SETTINGS):
        figure, axes = _axes()
        looks = styles(lines.index)
        for label, points in lines.iterrows():
            points = points.dropna().map(lambda point: point.times(scale))
            at = [places.index(place) if words else place for place in points.index]
            value, low, high = zip(*map(_bounds, points), strict=True)
            axes.fill_between(at, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
            axes.plot(at, value, label=label, **looks[label])
        if words:
            axes.set_xticks(range(len(places)), [ascii(place)[1:-1] for place in places], rotation=20, ha="right")
        else:
            ticks = sorted(places)
            _logarithmic(axes.xaxis, ticks if len(ticks) <= 8 else [2**i for i in range(0, 24, 2)])
            axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        if log_y:
            _logarithmic(axes.yaxis)
        _name(figure, axes, x, y)
    return Plot(name, title, caption, figure)


def _bounds(point: Measured) -> tuple[float, float, float]:
    """The value, and the ends of its interval or the value again."""
    low, high = (point.value if bound is None else bound for bound in (point.low, point.high))
    return point.value, low, high


def courses(name: str, title: str, caption: str, lines: pd.DataFrame, x: str, y: str) -> Plot:
    """A line for each run, both axes linear; runs of one label are drawn alike.

    Args:
        lines: a row for each run: `label`, and the lists `x` and `y`.
    """
    with rc_context(SETTINGS):
        figure, axes = _axes()
        looks = styles(lines["label"])
        for label, xs, ys in zip(lines["label"], lines[x], lines["value"], strict=True):
            axes.plot(xs, ys, label=label, **looks[label] | {"markersize": 3.5})
        axes.xaxis.set_major_formatter(_plain)
        _name(figure, axes, x, y)
    return Plot(name, title, caption, figure)


def pareto(
    name: str, title: str, caption: str, points: Mapping[str, tuple[float, Measured]], x: str, y: str, higher: bool
) -> Plot | None:
    """One point for each name; a line joins those that no other beats on both axes. Less of x is better.

    Args:
        points: label -> x, and the figure y.
        higher: whether more of y is better.
    """
    if len(points) < 2:
        return None
    sign = -1 if higher else 1
    best = front({label: (at, sign * figure.value) for label, (at, figure) in points.items()})
    with rc_context(SETTINGS):
        figure, axes = _axes()
        looks = styles(points)
        axes.plot([points[n][0] for n in best], [points[n][1].value for n in best], color="0.6", zorder=1, ls="--")
        for label, (at, shown) in points.items():
            value, low, high = _bounds(shown)
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            look = looks[label] | {"linestyle": "none", "markersize": 8}
            axes.errorbar([at], [value], yerr=spread, label=label, elinewidth=1, **look)
            if label in best:
                axes.scatter([at], [value], s=190, facecolors="none", edgecolors="0.45", zorder=1)
        least, most = min(at for at, _ in points.values()), max(at for at, _ in points.values())
        if most > 4 * least > 0 and math.isfinite(most):
            _logarithmic(axes.xaxis)
        axes.margins(0.12)
        _name(figure, axes, x, y)
    return Plot(name, title, caption + f" Circled, on the dashed front: {', '.join(best)}.", figure)
