"""A figure as a small SVG: matplotlib places everything, and each series is a group that the page can hide or read."""

from collections.abc import Iterable, Mapping, Sequence
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
    series = [drawing.series(number, series, hover[series]) for number, series in enumerate(names)]
    beside = [drawing.line(artist, f"{name}-front{i}") for i, artist in enumerate(drawing.artists(None))]
    return "\n".join([start, *drawing.frame(), *beside, *series, *legend, "</svg>\n"])


class _Drawing:
    """Places of a drawn figure in points from its upper left corner."""

    def __init__(self, figure: Figure, name: str) -> None:
        self.name = name
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
                color = to_hex(artist.get_facecolor()[0])
                parts += [f'<path d="{_path(self.places(p.vertices))}Z" fill="{color}" opacity=".15"/>'
                          for p in artist.get_paths()]  # fmt: skip
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
        return self.stroke(line, at, key, ("start", "mid", "end"), words)

    def stroke(self, line: Line2D, at: Any, key: str, marked: Sequence[str], more: str = "") -> str:
        """A line through places, drawn as another line, with its markers at the `marked` ones."""
        marker, style = _marker(line, key), str(line.get_linestyle())
        shown: Any = line.get_color()
        color = "none" if style == "None" else to_hex(shown)
        used = "".join(f' marker-{which}="url(#{key})"' for which in marked if marker)
        pairs = " ".join(f"{_short(x)},{_short(y)}" for x, y in at)
        look = f'fill="none" stroke="{color}" stroke-width="{line.get_linewidth():g}"{DASHES.get(style, "")}'
        definition = "" if key in self._defined else marker
        self._defined |= {key} if marker else set()
        return f'{definition}<polyline points="{pairs}" {look}{used}{more}/>'

    def frame(self) -> list[str]:
        """Axes with their ticks, grid and names."""
        (left, top), (right, bottom) = self.places([[0, 1], [1, 0]], self.axes.transAxes)
        made = []
        for place, words in _ticks(self.axes.xaxis):
            x = self.places([[place, 0]], self.axes.get_xaxis_transform())[0][0]
            made.append(f'<path d="M{_short(x)} {top:.0f}V{bottom:.0f}" stroke="#e6e6e6"/>')
            if set(words) & set(ascii_lowercase.replace("e", "")):  # not 1e+06
                turned = f' transform="rotate(-20 {_short(x)} {bottom + 12:.0f})"'
                made.append(_text(words, x, bottom + 12, "end", turned))
            else:
                made.append(_text(words, x, bottom + 13, "middle"))
        for place, words in _ticks(self.axes.yaxis):
            y = self.places([[0, place]], self.axes.get_yaxis_transform())[0][1]
            made.append(f'<path d="M{left:.0f} {_short(y)}H{right:.0f}" stroke="#e6e6e6"/>')
            made.append(_text(words, left - 5, y + 3.3, "end"))
        made.append(f'<path d="M{left:.0f} {top:.0f}V{bottom:.0f}H{right:.0f}" fill="none" stroke="#666"/>')
        made.append(_text(self.axes.get_xlabel(), (left + right) / 2, self.size[1] - 5, "middle"))
        turned = f' transform="rotate(-90 9 {(top + bottom) / 2:.0f})"'
        return [*made, _text(self.axes.get_ylabel(), 9, (top + bottom) / 2, "middle", turned)]


def _legend(drawing: _Drawing, names: Sequence[str], width: float, top: float) -> tuple[list[str], int]:
    """The legend below the axes, each series once, in as many columns as fit; and its lines."""
    longest = max(map(len, names), default=1)
    columns = max(1, min(len(names), int(width // (LETTER * longest + 36))))
    rows = -(-len(names) // columns)
    made = []
    for i, name in enumerate(names):
        x, y = width / columns * (i // rows) + 6, top + LINE * (i % rows) + 6
        line = next(artist for artist in drawing.artists(name) if artist.get_label() == name)
        swatch = drawing.stroke(line, [(x, y), (x + 11, y), (x + 22, y)], f"{drawing.name}-{i}", ("mid",))
        words = _text(_cut(name, width / columns), x + 28, y + 3.2, "start")
        made.append(f'<g data-series="{escape(name)}">{swatch}{words}</g>')
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
    outline = "".join(_segment(points, code) for points, code in path.iter_segments())
    shape_of = f'circle r="{size / 2:g}"' if line.get_marker() == "o" else f'path d="{outline}" transform="scale(1 -1)"'
    shown = f'<{shape_of} fill="{"#fff" if line.get_fillstyle() == "none" else color}" stroke="{color}"/>'
    return f'<marker id="{key}" overflow="visible" markerUnits="userSpaceOnUse">{shown}</marker>'


def _segment(points: np.ndarray, code: Any) -> str:
    return LETTERS[code] + (_numbers(points) if code != Path.CLOSEPOLY else "")


def _path(points: np.ndarray) -> str:
    return "M" + "L".join(map(_numbers, points))


def _numbers(values: Iterable[float]) -> str:
    return " ".join(map(_short, values))


def _short(value: float) -> str:
    return f"{value + 0.0:.1f}".removesuffix(".0")


def _text(words: str, x: float, y: float, anchor: str, more: str = "") -> str:
    return f'<text x="{_short(x)}" y="{_short(y)}" text-anchor="{anchor}"{more}>{escape(words)}</text>'
