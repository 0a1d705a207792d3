"""Plots of the report. The same numbers give the same bytes; an architecture looks the same in all of them."""

import base64
import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import AutoLocator, FixedLocator, LogLocator, NullLocator

from .figures import front
from .labels import styles
from .svg import svg
from .tables import WORDS, Column, Measured

SETTINGS: Any = {"svg.hashsalt": "bsbr_pl", "text.parse_math": False, "font.size": 9.5, "pdf.fonttype": 42}
SETTINGS |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.4", "axes.grid": True}
SETTINGS |= {"grid.color": "0.9", "lines.linewidth": 1.6, "lines.markersize": 5, "legend.frameon": False}
NOTHING: Mapping[str, Any] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
MAPS_IN_ROW = 3  # of heat maps
DARK = 0.6  # shares from here on have white numbers
MOST_TICKS = 8  # lengths that are all marked on an axis
PAPER, PAPER_FONT = 3.25, 7.5  # inches, the width of a column of a paper; points


@dataclass
class Picture:
    """A picture, the name of its file, and what it shows.

    Args:
        other: of an SVG, the same with other scales; of a PNG, what the page shows, as a data URL.
        switch: the name of those scales.
    """

    name: str
    title: str
    caption: str
    format: str  # png or svg
    content: bytes
    figure: Figure | None = None
    other: str = ""
    switch: str = ""
    kind = "picture"

    @property
    def file(self) -> str:
        return f"{self.name}.{self.format}"


class Plot:
    """A figure of words.toml.

    Args:
        key: of the plot in words.toml.
        suffix: the end of the file's name.
        facts: the values of {names} in its title, caption and axes.
    """

    def __init__(self, key: str, suffix: str, /, **facts: Any) -> None:
        self.words = {name: text.format(**facts) for name, text in WORDS["plots"][key].items()}
        self.name = f"{key}_{suffix}"
        self.hover: dict[str, list[str]] = {}
        self.figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self.axes.set(xlabel=_ascii(self.words["x"]), ylabel=self.words["y"])

    def series(self, name: str, xs: Sequence[Any], ys: Sequence[Any], words: Iterable[str], **look: Any) -> None:
        """A line with markers; `words`: of each point, shown when the pointer is near."""
        self.axes.plot(xs, ys, label=name, gid=name, **look)
        self.hover.setdefault(name, []).extend(text.replace("|", "/") for text in words)

    def picture(self, switched: bool = False) -> Picture:
        """The picture; if `switched`, also one whose x axis is logarithmic instead of linear, or the reverse."""
        title, caption = self.words["title"], self.words["caption"]
        found = Picture(self.name, title, caption, "svg", self._svg(self.name), self.figure)
        if switched:
            axis = self.axes.xaxis
            scale, ticks = axis.get_scale(), axis.get_major_locator()
            other = "log" if scale == "linear" else "linear"
            _set_scale(axis, other)
            found.switch = f"{other} scale"
            found.other = self._svg(f"{self.name}-switched").decode()
            _set_scale(axis, scale, ticks)
        return found

    def _svg(self, name: str) -> bytes:
        with rc_context(SETTINGS):
            return svg(self.figure, name, self.hover).encode()


def drawn(figure: Figure, form: str, width: float | None = None) -> bytes:
    """The figure with its legend as `png` or `pdf`, without a date or a version in it.

    Args:
        width: in inches, for a paper: with small letters; None for the width of the figure.
    """
    stream = io.BytesIO()
    with rc_context(SETTINGS):
        if width is not None:
            figure.set_size_inches(width, width * max(0.62, figure.get_figheight() / figure.get_figwidth()))
            for text in figure.findobj(Text):
                text.set_fontsize(PAPER_FONT)  # type: ignore[attr-defined]
        if not figure.legends:
            _add_legend(figure, 8.5 if width is None else PAPER_FONT)
        figure.savefig(stream, format=form, dpi=144, metadata=NOTHING[form])
    return stream.getvalue()


def _add_legend(figure: Figure, size: float) -> None:
    """A legend below the axes, in as many columns as fit; the figure becomes higher by its height."""
    by_name: dict[str, Any] = {}
    for axes in figure.axes:
        handles, names = axes.get_legend_handles_labels()
        by_name |= zip(names, handles, strict=True)
    if not by_name:
        return
    letters = figure.get_figwidth() * 102 / size  # in a line
    wrapped = ["\n".join(textwrap.wrap(_ascii(name), int(letters) - 6)) for name in by_name]
    columns = max(1, min(len(wrapped), int(letters // (max(map(len, wrapped)) + 6))))
    lines = sum(name.count("\n") + 1 for name in wrapped)
    figure.set_figheight(figure.get_figheight() + 0.0235 * size * math.ceil(lines / columns))
    figure.legend(list(by_name.values()), wrapped, loc="outside lower center", ncols=columns, fontsize=size)


def _ascii(text: str) -> str:
    r"""Text in ASCII: other letters as `\u4e2d`, which every font of matplotlib can show."""
    return ascii(text)[1:-1]


def _plain(value: float, _: float = 0) -> str:
    return f"{value:,.10g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"


def _short(length: int) -> str:
    """`512`, `2k`."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _set_scale(axis: Axis, scale: str, ticks: Any = None) -> None:
    """Make an axis `log` or `linear`, with plain numbers at `ticks`; by default at 1, 3, 10, 30, ... if it is `log`."""
    axis.axes.set(**{"xscale" if axis is axis.axes.xaxis else "yscale": scale})
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(ticks or (LogLocator(10, subs=(1.0, 3.0)) if scale == "log" else AutoLocator()))
    axis.set_major_formatter(_plain)


def _words(x: Any, figure: Measured) -> str:
    """A point in words: `512: 1.143 [1.141, 1.145]`."""
    if not isinstance(x, str):
        x = _plain(x) if float(x).is_integer() else Column("").number(x)
    return f"{x}: {' '.join(Column('').parts(figure)).strip()}"


def curves(
    key: str, suffix: str, lines: pd.DataFrame, /, scale: float = 1, log_y: bool = False, **facts: Any
) -> Picture | None:
    """A line with its interval for each row of a frame of figures, by label; None unless one has two points.

    Args:
        lines: a column for each x: numbers on a logarithmic axis, words in their order.
        scale: y is shown times this.
    """
    lines = lines.dropna(how="all").dropna(how="all", axis=1)
    at = list(lines.columns)
    if lines.notna().sum(axis=1).max() < 2 or lines.empty:
        return None
    words = any(isinstance(x, str) for x in at)
    with rc_context(SETTINGS):
        plot = Plot(key, suffix, **facts)
        looks = styles(lines.index)
        for label, points in lines.iterrows():
            points = points.dropna().map(lambda point: point.times(scale))
            xs = [at.index(x) if words else x for x in points.index]
            low, high = zip(*points.map(lambda point: point.bounds), strict=True)
            if low != high:
                plot.axes.fill_between(xs, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0, gid=label)
            values = [point.value for point in points]
            shown = map(Measured, values) if log_y else points  # intervals of costs are in their tables
            plot.series(str(label), xs, values, map(_words, points.index, shown), **looks[label])
        if words:
            plot.axes.set_xticks(range(len(at)), map(_ascii, at), rotation=20, ha="right")
        else:
            ticks = sorted(at) if len(at) <= MOST_TICKS else [2**i for i in range(0, 24, 2)]
            _set_scale(plot.axes.xaxis, "log", FixedLocator(ticks))
            plot.axes.set_xlim(min(at) / 1.15, max(at) * 1.15)
        if log_y:
            _set_scale(plot.axes.yaxis, "log")
        return plot.picture()


def courses(key: str, suffix: str, lines: pd.DataFrame, x: str, /, **facts: Any) -> Picture:
    """A line for each run, both axes linear; runs of one label are drawn alike.

    Args:
        lines: a row for each run: `label`, and the lists `x` and `value`.
    """
    with rc_context(SETTINGS):
        plot = Plot(key, suffix, **facts)
        looks = styles(lines["label"])
        for label, xs, ys in zip(lines["label"], lines[x], lines["value"], strict=True):
            points = pd.Series(list(ys), list(xs), dtype=float).dropna()
            points = points[points.index.notna()]
            words = [_words(x, Measured(y)) for x, y in points.items()]
            plot.series(label, list(points.index), list(points), words, **looks[label] | {"markersize": 3.5})
        plot.axes.xaxis.set_major_formatter(_plain)
        return plot.picture()


def pareto(
    key: str, suffix: str, points: Mapping[str, tuple[Measured, Measured]], worse: int, /, **facts: Any
) -> Picture | None:
    """One point with its intervals for each label; a line joins those that no other beats on both axes.

    Args:
        points: label -> the figures x, of which less is better, and y.
        worse: the sign of worse y.
    """
    if len(points) < 2:
        return None
    best = front({label: (x.value, worse * y.value) for label, (x, y) in points.items()})
    with rc_context(SETTINGS):
        plot = Plot(key, suffix, **facts)
        looks = styles(points)
        line = [points[label] for label in best]
        plot.axes.plot([x.value for x, _ in line], [y.value for _, y in line], color="0.6", zorder=1, ls="--")
        for label, (x, y) in points.items():
            look = looks[label] | {"linestyle": "none", "markersize": 8}
            bar: dict[str, Any] = {"color": looks[label]["color"], "linewidth": 1, "gid": label}
            plot.axes.plot([x.value, x.value], y.bounds, **bar)
            if x.low is not None:
                plot.axes.plot(x.bounds, [y.value, y.value], **bar)
            plot.series(label, [x.value], [y.value], [_words(x.value, y)], **look)
        plot.axes.margins(0.12)
        xs = [x.value for x, _ in points.values()]
        _set_scale(plot.axes.xaxis, "log" if max(xs) > 4 * min(xs) > 0 else "linear")
        return plot.picture(switched=0 < min(xs) < max(xs))


def heat_maps(key: str, suffix: str, maps: Mapping[str, pd.DataFrame], /, **facts: Any) -> Picture:
    """A small map for each name: the rows of its frame of shares from the top, its columns from the left, in %."""
    words = {name: text.format(**facts) for name, text in WORDS["plots"][key].items()}
    rows = math.ceil(len(maps) / MAPS_IN_ROW)
    with rc_context(SETTINGS | {"axes.grid": False}):
        figure = Figure(figsize=(5.6, 1.7 * rows + 0.4), layout="constrained")
        every = figure.subplots(rows, MAPS_IN_ROW, squeeze=False).ravel()
        for axes in every[len(maps) :]:
            axes.set_visible(False)
        for axes, (name, shares) in zip(every, maps.items(), strict=False):
            axes.imshow(shares.to_numpy(float), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_title("\n".join(textwrap.wrap(_ascii(name), 30)), fontsize=8.5)
            axes.set_xticks(range(shares.shape[1]), map(_short, shares.columns))
            axes.set_yticks(range(shares.shape[0]), map(_plain, shares.index))
            for (y, x), share in np.ndenumerate(shares.to_numpy(float)):
                color = "white" if share >= DARK else "black"
                axes.text(x, y, "" if np.isnan(share) else f"{100 * share:.0f}", ha="center", va="center", color=color)
        figure.supxlabel(words["x"], fontsize=9.5)
        figure.supylabel(words["y"], fontsize=9.5)
        png = drawn(figure, "png")
    inline = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Picture(f"{key}_{suffix}", words["title"], words["caption"], "png", png, figure, inline)
