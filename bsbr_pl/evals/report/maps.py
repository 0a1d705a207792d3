"""The attention map of every layer and head, on the start of the validation text."""

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from bsbr_pl.utils.visualization import attention_inputs, draw_maps
from bsbr_pl.values import one_line

from ..checkpoints import Checkpoint
from .findings import Findings
from .plot import SETTINGS, Plot

MAP_TOKENS, MAP_LAYERS, MAP_HEADS, MAP_BYTES = (128, 64, 32), 4, 4, 200_000


def plots(findings: Findings) -> tuple[list[Plot], list[str]]:
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
