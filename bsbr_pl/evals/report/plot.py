"""Plots of the report. The same numbers give the same bytes; an architecture looks the same in all of them."""

import io
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colors, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from ..checkpoints import kind
from .numbers import front
from .table import Measured

Course = tuple[str, list[float], list[float]]  # of a run: its label, x, y
# Okabe & Ito's colours, which the colour-blind tell apart.
STYLES = {
    "bsbr": ("#d55e00", "o"),
    "standard": ("#222222", "s"),
    "sliding_window": ("#e69f00", "D"),
    "linear": ("#56b4e9", "^"),
    "delta_net": ("#0072b2", "v"),
    "gated_delta_net": ("#7a5fb5", "*"),
    "hopfield": ("#cc79a7", "P"),
    "gau": ("#009e73", "X"),
}
OTHERS = (("#8c6d46", "<"), ("#7f7f7f", ">"), ("#a6a300", "h"))
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


@dataclass
class Plot:
    """A figure, the name of its files, and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure
    raster: bool = False  # shown as PNG

    def image(self, kind: str, dpi: int = 144) -> bytes:
        """The figure as `png` or `svg`, without a date or a version in it."""
        stream = io.BytesIO()
        nothing = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
        with rc_context(SETTINGS):
            self.figure.savefig(stream, format=kind, dpi=dpi, metadata=nothing[kind])
        return stream.getvalue()


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each name is drawn: colour and marker by architecture, the line by which of its variants it is."""
    seen: dict[str, int] = {}
    found = {}
    for name in sorted(set(names)):
        architecture = kind(name)
        number = seen[architecture] = seen.get(architecture, -1) + 1
        color, marker = STYLES.get(architecture) or OTHERS[zlib.crc32(architecture.encode()) % len(OTHERS)]
        paler = 1 - 0.7 ** (number // 4)
        mixed = tuple(paler + (1 - paler) * part for part in colors.to_rgb(color))
        line = ("-", "--", ":", "-.")[number % 4]
        found[name] = {
            "color": mixed,
            "marker": marker,
            "linestyle": line,
            "fillstyle": "none" if number % 2 else "full",
        }
    return found


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
    name: str,
    title: str,
    caption: str,
    lines: Mapping[str, Mapping[Any, Measured]],
    x: str,
    y: str,
    log_y: bool = False,
    scale: float = 1.0,
) -> Plot | None:
    """A line with its interval for each name: x -> measured; numbers on a logarithmic axis, words in their order."""
    lines = {label: points for label, points in lines.items() if points}
    places = list(dict.fromkeys(place for points in lines.values() for place in points))
    if not places:
        return None
    words = any(isinstance(place, str) for place in places)
    with rc_context(SETTINGS):
        figure, axes = _axes()
        looks = styles(lines)
        for label, points in lines.items():
            at = [places.index(place) if words else place for place in points]
            low = [scale * (p.value if p.low is None else p.low) for p in points.values()]
            high = [scale * (p.value if p.high is None else p.high) for p in points.values()]
            axes.fill_between(at, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
            axes.plot(at, [scale * p.value for p in points.values()], label=label, **looks[label])
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


def courses(name: str, title: str, caption: str, lines: Sequence[Course], x: str, y: str) -> Plot:
    """A line for each run, both axes linear; runs of one label are drawn alike."""
    with rc_context(SETTINGS):
        figure, axes = _axes()
        looks = styles(label for label, _, _ in lines)
        for label, xs, ys in lines:
            axes.plot(xs, ys, label=label, **looks[label] | {"markersize": 3.5})
        axes.xaxis.set_major_formatter(_plain)
        _name(figure, axes, x, y)
    return Plot(name, title, caption, figure)


def pareto(
    name: str,
    title: str,
    caption: str,
    points: Mapping[str, tuple[float, Measured]],
    x: str,
    y: str,
    higher: bool = False,
) -> Plot | None:
    """One point for each name; a line joins those that no other beats on both axes. Less of x is better."""
    if len(points) < 2:
        return None
    sign = -1 if higher else 1
    best = front({label: (at, sign * value.value) for label, (at, value) in points.items()})
    with rc_context(SETTINGS):
        figure, axes = _axes()
        looks = styles(points)
        axes.plot([points[n][0] for n in best], [points[n][1].value for n in best], color="0.6", zorder=1, ls="--")
        for label, (at, value) in points.items():
            look = looks[label] | {"linestyle": "none", "markersize": 8}
            spread = [[0.0], [0.0]]
            if value.low is not None and value.high is not None:
                spread = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
            axes.errorbar([at], [value.value], yerr=spread, label=label, elinewidth=1, **look)
            if label in best:
                axes.scatter([at], [value.value], s=190, facecolors="none", edgecolors="0.45", zorder=1)
        if max(at for at, _ in points.values()) > 4 * min(at for at, _ in points.values()) > 0:
            _logarithmic(axes.xaxis)
        axes.margins(0.12)
        _name(figure, axes, x, y)
    return Plot(name, title, caption + f" Circled, on the dashed front: {', '.join(best)}.", figure)
