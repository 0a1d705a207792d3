"""A figure as a small SVG: matplotlib places everything, and each series is a group that the page can hide or read."""

import math
import zlib
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

DASHES = {
    "--": ' stroke-dasharray="6 3"',
    ":": ' stroke-dasharray="1.5 2.5"',
    "-.": ' stroke-dasharray="6 2.5 1.5 2.5"',
}
LETTERS: Mapping[Any, str] = {
    Path.MOVETO: "M",
    Path.LINETO: "L",
    Path.CURVE3: "Q",
    Path.CURVE4: "C",
    Path.CLOSEPOLY: "Z",
}
SIZE, LINE, LETTER = 9.5, 13.0, 5.4  # of text, in points: its height, a line of the legend, the mean width of a letter


def svg(figure: Figure, name: str, hover: Mapping[str, Sequence[str]]) -> str:
    """The SVG of a figure with one pair of axes.

    Args:
        figure: artists whose gid is the name of a series become one group, `<g data-series="name">`.
        name: start of all ids, so that several figures fit into one page.
        hover: series -> the words of each of its points.
    """
    figure.draw_without_rendering()  # places the axes
    drawing = _Drawing(figure, name)
    names = list(hover)
    width, height = drawing.size
    legend, rows = _legend(drawing, names, width, height)
    box = f'viewBox="0 0 {width:g} {height + LINE * rows + 4:g}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" {box} font-family="sans-serif" font-size="{SIZE}">'
    series = [drawing.series(number, name, hover[name]) for number, name in enumerate(names)]
    beside = [drawing.line(artist, f"{drawing.name}-front{i}") for i, artist in enumerate(drawing.artists(None))]
    lines = ['<g fill="none" stroke-width="1.6">', *beside, *series, *(line for line, _ in legend), "</g>"]
    return "\n".join([start, *drawing.frame(), *lines, *(words for _, words in legend), "</svg>\n"])


class _Drawing:
    """Converts the artists of a drawn figure to SVG. Places are in points from the upper left corner."""

    def __init__(self, figure: Figure, name: str) -> None:
        self.name = f"{zlib.crc32(name.encode()):x}"  # short: it starts many ids
        self.axes: Axes = figure.axes[0]
        self.size = 72 * figure.get_size_inches()
        self._to_figure = figure.transFigure.inverted()
        self._defined: set[str] = set()  # ids of markers

    def places(self, points: Any, transform: Any = None) -> np.ndarray:
        """(n, 2): where points are shown; in the data's coordinates, or in those of a transform."""
        shown = self._to_figure.transform((transform or self.axes.transData).transform(np.asarray(points, float)))
        return self.size * (shown * [1, -1] + [0, 1])

    def artists(self, series: str | None) -> list[Any]:
        """Lines and areas of a series; None for those of none."""
        return [one for one in (*self.axes.collections, *self.axes.lines) if one.get_gid() == series]

    def series(self, number: int, name: str, hover: Sequence[str]) -> str:
        parts, rest = [], list(hover)
        for artist in self.artists(name):
            if isinstance(artist, PolyCollection):
                fill: Any = artist.get_facecolor()
                color = to_hex(fill[0])
                for path in artist.get_paths():
                    corners = " ".join(f"{x:.0f} {y:.0f}" for x, y in self.places(path.vertices))
                    parts.append(f'<path d="M{corners}Z" fill="{color}" opacity=".15"/>')
            else:
                own = len(artist.get_xdata()) if artist.get_label() == name else 0  # the others show intervals
                parts.append(self.line(artist, f"{self.name}-{number}", rest[:own]))
                rest = rest[own:]
        return f'<g data-series="{escape(name)}">{"".join(parts)}</g>'

    def line(self, line: Line2D, key: str, hover: Sequence[str] = ()) -> str:
        """A line with its markers and the words of its points."""
        at = self.places(np.column_stack(line.get_data()))
        at = np.repeat(at, 2, 0) if len(at) == 1 else at  # browsers draw no line of one point
        words = f' data-hover="{escape("|".join(hover))}"' if hover else ""
        return self.stroke(line, at, key, "marker", words)

    def stroke(self, line: Line2D, at: Any, key: str, marked: str, more: str = "") -> str:
        """A line through places, drawn as another line; `marked`: marker for all places, marker-mid for inner ones."""
        marker, style = _marker(line, key), str(line.get_linestyle())
        shown: Any = line.get_color()
        color = "none" if style == "None" else to_hex(shown)
        used = f' style="{marked}:url(#{key})"' if marker else ""
        pairs = " ".join(f"{_short(x)},{_short(y)}" for x, y in at)
        look = f'stroke="{color}"{DASHES.get(style, "")}'
        definition = "" if key in self._defined else marker
        self._defined.add(key)
        return f'{definition}<polyline points="{pairs}" {look}{used}{more}/>'

    def frame(self) -> list[str]:
        """Axes with their ticks, grid and names."""
        (left, top), (right, bottom) = self.places([[0, 1], [1, 0]], self.axes.transAxes)
        grid, below, beside = "", [], []
        for place, words in _ticks(self.axes.xaxis):
            x = self.places([[place, 0]], self.axes.get_xaxis_transform())[0][0]
            grid += f"M{_short(x)} {top:.0f}V{bottom:.0f}"
            if set(words) & set(ascii_lowercase.replace("e", "")):  # not 1e+06
                beside.append(_text(words, x, bottom + 12, f' transform="rotate(-20 {_short(x)} {bottom + 12:.0f})"'))
            else:
                below.append(_text(words, x, bottom + 13))
        for place, words in _ticks(self.axes.yaxis):
            y = self.places([[0, place]], self.axes.get_yaxis_transform())[0][1]
            grid += f"M{left:.0f} {_short(y)}H{right:.0f}"
            beside.append(_text(words, left - 5, y + 3.3))
        below.append(_text(self.axes.get_xlabel(), (left + right) / 2, self.size[1] - 5))
        middle = (top + bottom) / 2
        below.append(_text(self.axes.get_ylabel(), 9, middle, f' transform="rotate(-90 9 {middle:.0f})"'))
        return [
            f'<path d="{grid}" stroke="#e6e6e6"/>',
            f'<path d="M{left:.0f} {top:.0f}V{bottom:.0f}H{right:.0f}" fill="none" stroke="#666"/>',
            f'<g text-anchor="middle">{"".join(below)}</g>',
            f'<g text-anchor="end">{"".join(beside)}</g>',
        ]


def _legend(drawing: _Drawing, names: Sequence[str], width: float, top: float) -> tuple[list[tuple[str, str]], int]:
    """The legend below the axes, in as many columns as fit: line and name of each series; and the number of rows."""
    longest = max(map(len, names), default=1)
    columns = max(1, min(len(names), int(width // (LETTER * longest + 36))))
    rows = math.ceil(len(names) / columns)
    made = []
    for i, name in enumerate(names):
        x, y = width / columns * (i // rows) + 6, top + LINE * (i % rows) + 6
        line = next(artist for artist in drawing.artists(name) if artist.get_label() == name)
        swatch = drawing.stroke(line, [(x, y), (x + 11, y), (x + 22, y)], f"{drawing.name}-{i}", "marker-mid")
        words = _text(_cut(name, width / columns), x + 28, y + 3.2)
        group = f'<g data-series="{escape(name)}">'
        made.append((f"{group}{swatch}</g>", f"{group}{words}</g>"))
    return made, rows


def _cut(name: str, width: float) -> str:
    """A name that is too long for its column of the legend, without its middle."""
    most = int((width - 36) / LETTER)
    return name if len(name) <= most else f"{name[: most // 2]}\u2026{name[-(most // 2 - 1) :]}"


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    """The ticks that are shown, with their words."""
    low, high = sorted(axis.get_view_interval())
    places = axis.get_majorticklocs()
    words = axis.get_major_formatter().format_ticks(list(places))
    return [(place, text) for place, text in zip(places, words, strict=True) if low <= place <= high]


def _marker(line: Line2D, key: str) -> str:
    """The definition of a line's marker with an id; "" if it has none."""
    shape, size = MarkerStyle(line.get_marker(), line.get_fillstyle()), line.get_markersize()
    path = shape.get_path().transformed(shape.get_transform() + Affine2D().scale(size))
    if not np.size(path.vertices):
        return ""
    color = to_hex(line.get_markeredgecolor())
    if line.get_marker() == "o":
        tag = f'circle r="{size / 2:g}"'
    else:
        outline = ""
        for points, code in path.iter_segments():
            outline += LETTERS[code]
            if code != Path.CLOSEPOLY:
                outline += " ".join(map(_short, points))
        tag = f'path d="{outline}" transform="scale(1 -1)"'
    fill = "#fff" if line.get_fillstyle() == "none" else color
    shown = f'<{tag} fill="{fill}" stroke="{color}" stroke-width="1"/>'
    return f'<marker id="{key}" overflow="visible" markerUnits="userSpaceOnUse">{shown}</marker>'


def _short(value: float) -> str:
    return f"{value + 0.0:.1f}".removesuffix(".0")


def _text(words: str, x: float, y: float, more: str = "") -> str:
    return f'<text x="{_short(x)}" y="{_short(y)}"{more}>{escape(words)}</text>'
