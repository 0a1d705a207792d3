"""Plots of the report. The same numbers give the same bytes; an architecture looks the same in all of them."""

import io
import math
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colors, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from bsbr_pl.utils.records import one_line
from bsbr_pl.utils.visualization import attention_inputs, draw_maps

from ..checkpoints import Checkpoint, kind
from .findings import (
    MALFORMED,
    Findings,
    Group,
    Study,
    cost,
    finite,
    front,
    nearest,
    pooled,
    slices,
)
from .table import (
    SCALES,
    Measured,
)
from .tables import (
    COSTS,
    trained_length,
    training_seconds,
)

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
MAP_TOKENS, MAP_LAYERS, MAP_HEADS, MAP_BYTES = (128, 64, 32), 4, 4, 200_000


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


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, each name once, in as many columns as the names allow; the figure grows by its height."""
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
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _legend(figure, axes)
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
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.margins(0.12)
        _legend(figure, axes)
    return Plot(name, title, caption + f" Circled, on the dashed front: {', '.join(best)}.", figure)


# The plots of each section.


def length_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Bits per byte by length; loss by position, in contexts of training's length and in the longest."""
    groups, source = _certified(study), f"{study.title}. {findings.source(study.rows)}"
    lines = {
        group.label: {n: value for n in study.lengths if (value := pooled(group.at(n), "bits_per_byte"))}
        for group in groups
    }
    caption = f"The same text, read in longer contexts than in training. {source}"
    name, title, x = f"by_length_{study.name}", "Bits per byte by length of context", "context (tokens)"
    plots = [curves(name, title, caption, lines, x, "bits per byte")] if len(study.lengths) > 1 else []
    validated = [n for n in study.lengths if n in {member.length for group in groups for member in group.members}]
    for length in dict.fromkeys([*validated[:1], *study.lengths[-1:]]):
        lines = {group.label: slices(group.at(length), "by_position", "loss", by="stop") for group in groups}
        caption = f"Mean loss of the tokens after the mark before and up to each mark. {source}"
        name, title = f"by_position_{length}_{study.name}", f"Loss by position, contexts of {length:,} tokens"
        plots.append(curves(name, title, caption, lines, "position in the context (tokens)", "loss (nats a token)"))
    return plots


def hits_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Loss by the distance at which a token's bigram was last seen."""
    found = {group.label: slices(group.own, "recall", "loss") for group in _certified(study)}
    lines = {label: {name: value for name, value in of.items() if name != "hits"} for label, of in found.items()}
    caption = "How many tokens ago a token's bigram was last seen; the rest had not been. "
    caption += f"{study.title}. {findings.source(study.rows)}"
    name, title = f"hits_{study.name}", "Loss on recall hits by distance"
    return [curves(name, title, caption, lines, "bigram last seen (tokens)", "loss (nats a token)")]


def recall_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Accuracy by length where the slices differ in it, else by slice."""
    lines: dict[str, dict[Any, Measured]] = {}
    for group in _certified(study):
        lengths = {entry["slice"]: entry.get("length") for row in group.own for entry in row["values"]["slices"]}
        distinct = len(set(lengths.values())) == len(lengths) and None not in lengths.values()
        found = slices(group.own, "slices", "accuracy")
        lines[group.label] = {lengths[name] if distinct else name: value for name, value in found.items()}
    places = {place for points in lines.values() for place in points}
    if len(places) < 2:
        return []
    x = "slice" if any(isinstance(place, str) for place in places) else "length (tokens)"
    caption = f"Share of questions answered right. {study.title}. {findings.source(study.rows)}"
    name, title = f"recall_{study.name}", f"Recall by {x.split()[0]}"
    return [curves(name, title, caption, lines, x, "accuracy (%)", scale=100)]


def _certified(study: Study) -> list[Group]:
    return [group for group in study.groups if group.status != "disqualified"]


def cost_plots(findings: Findings, place: str) -> list[Plot | None]:
    """Every cost against length, both in logarithms."""
    bodies, plots = findings.costs[place], []
    source = findings.cost_source(place)
    for value, title, unit in COSTS:
        lines = {
            name: {length: of for length, row in sorted(rows.items()) if (of := cost(row, value)) and of.value > 0}
            for name, rows in bodies.items()
        }
        name, scale = f"cost_{value}_{place}", SCALES[unit]
        shown = f"{title[0].upper()}{title[1:]} by length, {place}"
        plots.append(
            curves(name, shown, source, lines, "length (tokens)", f"{title} ({unit})", log_y=True, scale=scale)
        )
    return plots


def pareto_plots(study: Study, findings: Findings) -> list[Plot | None]:
    """Quality against the time to train and against the decode state."""
    groups = study.ranked()
    what, y, scale = ("accuracy", "accuracy (%)", 100) if study.recall else ("bits_per_byte", "bits per byte", 1)
    title = "Accuracy" if study.recall else "Bits per byte"
    caption = f"The {'upper' if study.recall else 'lower'} left is better. "
    caption += f"{study.title}. {findings.source(study.rows)}"
    longest = max((length for group in groups for length in group.costs), default=0)
    at = sorted({n for group in groups if (n := nearest(group.costs, trained_length(group)))})
    times: dict[str, tuple[float, Measured]] = {}
    states: dict[str, tuple[float, Measured]] = {}
    for group in groups:
        quality, seconds, state = pooled(group.own, what), training_seconds(group), group.cost(longest, "state_bytes")
        for points, x, unit in ((times, seconds, "ms"), (states, state, "MB")):
            if quality and x:
                points[group.label] = SCALES[unit] * x.value, quality.times(scale)
    x_time = f"training pass at {' or '.join(f'{n:,}' for n in at)} tokens (ms)"
    x_state = f"decode state at {longest:,} tokens (MB)"
    return [
        pareto(f"pareto_training_{study.name}", f"{title} and training time", caption, times, x_time, y, study.recall),
        pareto(f"pareto_state_{study.name}", f"{title} and decode state", caption, states, x_state, y, study.recall),
    ]


# Four clocks: the course of training.


def clocks(findings: Findings) -> tuple[list[Plot], str]:
    """Validation loss against steps, tokens, training FLOPs and seconds, by data and machine; and what is missing."""
    panels: dict[tuple[str, str, str], dict[str, list[tuple[str, list[float], list[float]]]]] = {}
    missing: dict[str, list[str]] = {}
    for checkpoint in findings.checkpoints:
        try:
            metrics = checkpoint.record["metrics"]
            name = next(name for name in ("val/loss", "val/bits_per_byte") if metrics.get(name))
            values = [math.nan if (value := finite(one)) is None else value for one in metrics[name]["value"]]
            times = clock_values(checkpoint, name)
            place = findings.data_name(checkpoint.data_fingerprint or ""), machine(checkpoint), name
        except (*MALFORMED, StopIteration):
            missing.setdefault("any validation", []).append(checkpoint.name)
            continue
        for clock, at in times.items():
            if at is None:
                missing.setdefault(clock, []).append(checkpoint.name)
            else:
                panel = panels.setdefault(place, {}).setdefault(clock, [])
                panel.append((findings.labels[checkpoint.digest], at, values))
    plots = []
    for number, ((data, where, name), of) in enumerate(sorted(panels.items()), 1):
        for clock, lines in of.items():
            with rc_context(SETTINGS):
                figure, axes = _axes()
                looks = styles(label for label, _, _ in lines)
                for label, xs, ys in lines:
                    axes.plot(xs, ys, label=label, **looks[label] | {"markersize": 3.5})
                axes.xaxis.set_major_formatter(_plain)
                axes.set_xlabel(clock)
                axes.set_ylabel(name)
                _legend(figure, axes)
            caption = f"{data}; a line for each checkpoint's run. Trained on {where}."
            file = f"clocks_{number}_{clock.replace(' ', '_')}"
            plots.append(Plot(file, f"Validation by {clock}", caption, figure))
    return plots, "; ".join(f"{what} by {', '.join(names)}" for what, names in missing.items())


def clock_values(checkpoint: Checkpoint, name: str) -> dict[str, list[float] | None]:
    """When each validation took place, by each of the clocks; None where the record does not say."""
    record = checkpoint.record
    column, data = record["metrics"][name], record.get("data") or {}
    steps = [float(step) + 1 for step in column["step"]]  # Lightning counts from 0
    sizes = [
        data.get("batch_size"),
        data.get("context_length"),
        record.get("training", {}).get("accumulate_grad_batches"),
    ]
    sizes.append(record.get("environment", {}).get("processes"))
    is_text = checkpoint.data_class == "TextData" or data.get("class") == "TextData"
    per_step = float(np.prod(sizes)) if is_text and all(isinstance(size, int) for size in sizes) else None
    flops = (record["metrics"].get("flops/step_flops") or {}).get("value") or [None]
    return {
        "steps": steps,
        "tokens": None if per_step is None else [per_step * step for step in steps],
        "training FLOPs": None if flops[-1] is None else [flops[-1] * step for step in steps],
        "measured seconds": column.get("seconds"),
    }


def machine(checkpoint: Checkpoint) -> str:
    """What the seconds of a run depend on."""
    environment, training = checkpoint.record.get("environment", {}), checkpoint.record.get("training", {})
    versions = environment.get("versions", {})
    parts = [environment.get("gpu") or environment.get("cpu"), environment.get("device")]
    for name, value in (("threads", environment.get("threads")), ("processes", environment.get("processes")),
                        ("torch", versions.get("torch")), ("precision", training.get("precision"))):  # fmt: skip
        parts.append(None if value is None else f"{name} {value}")
    return ", ".join(str(part) for part in parts if part) or "an unknown machine"


# Attention maps.


def attention_maps(findings: Findings) -> tuple[list[Plot], list[str]]:
    """The maps of one checkpoint of every label on the start of the first validation window; and which have none."""
    plots, missing = [], []
    windows: dict[str, torch.Tensor | str] = {}
    first = {(c.data_fingerprint or "", findings.labels[c.digest]): c for c in reversed(findings.checkpoints)}
    for number, ((_, label), checkpoint) in enumerate(sorted(first.items()), 1):
        what = repr((checkpoint.data_class, sorted(checkpoint.data_arguments.items())))
        if what not in windows:
            windows[what] = _first_window(checkpoint)
        ids = windows[what]
        if isinstance(ids, str):
            missing.append(f"{label}: {ids}")
            continue
        try:
            plots.append(_map_plot(f"attention_{number}", label, checkpoint, ids))
        except Exception as error:  # no map, or none of this: the report goes on without the picture
            missing.append(f"{label}: {one_line(error, 200)}")
    return plots, missing


def _first_window(checkpoint: Checkpoint) -> torch.Tensor | str:
    """Ids (1, T) of the start of the first validation window, or why there are none."""
    try:
        data = checkpoint.open_data(eval_batch_size=1, num_workers=0)
        return next(iter(data.loader("val")))["input_ids"][:1, : MAP_TOKENS[0]]
    except Exception as error:
        return f"its data cannot be had ({one_line(error, 200)})"


def _map_plot(name: str, label: str, checkpoint: Checkpoint, ids: torch.Tensor) -> Plot:
    """A row for each layer, a column for each head, of at most four; fewer tokens where the picture would be large."""
    assert checkpoint.module is not None
    model = checkpoint.module.model
    for length in MAP_TOKENS:
        layers = list(enumerate(attention_inputs(model, ids[:, :length].to(model.embedding.weight.device))))
        kept = [layers[i] for i in sorted({round(i) for i in np.linspace(0, len(layers) - 1, MAP_LAYERS)})]
        with torch.no_grad(), rc_context(SETTINGS | {"axes.grid": False, "axes.spines.left": False}):
            maps = {i: attention.attention_map(x)[0, :MAP_HEADS] for i, (attention, x) in kept}
            heads, tokens = max(map(len, maps.values())), min(length, ids.shape[1])
            figure = Figure(figsize=(max(4.4, 1.7 * heads + 1.6), 1.7 * len(maps) + 0.7), layout="constrained")
            draw_maps(figure.add_subplot(), maps)
        shown = f"Layers {', '.join(map(str, maps))}; the first {heads} heads. " if len(kept) < len(layers) else ""
        caption = f"{checkpoint.name}, on the first {tokens} tokens of the validation split. {shown}White is exactly 0."
        plot = Plot(name, f"Attention of {label}", caption, figure, raster=True)
        if len(plot.image("png")) < MAP_BYTES:
            break
    return plot
