"""Attention maps as pictures, and as a few numbers. matplotlib is imported only to draw."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CELLS = 160  # cells per side of one drawn map; longer maps are shrunk
MAX_LABELS = 32  # with more tokens, their labels are not drawn


def visualize_attention(attention_weights: Tensor, tokens: Sequence[str] | None = None) -> "Axes":
    """Draw the maps of the first sequence on the current figure: a row for each layer, a column for each head.

    Args:
        attention_weights: (layers, batch, heads, T, T), as `LanguageModel.get_attention_weights` gives them.
        tokens: labels of the T tokens, drawn if T is at most 32.

    Raises:
        ValueError: if `attention_weights` does not have five axes, the last two of one length, if one is empty, if a
            weight is not finite, or there are not T tokens.
    """
    if attention_weights.ndim != 5 or attention_weights.shape[-1] != attention_weights.shape[-2]:
        shape = tuple(attention_weights.shape)
        raise ValueError(f"attention_weights must be (layers, batch, heads, T, T), got shape {shape}")
    if 0 in attention_weights.shape:
        raise ValueError(f"attention_weights is empty, its shape is {tuple(attention_weights.shape)}")
    rows = attention_weights.shape[-1]
    if tokens is not None and len(tokens) != rows:
        raise ValueError(f"tokens must hold {rows}, one for each row of a map, got {len(tokens)}")
    maps = dict(enumerate(torch.as_tensor(attention_weights)[:, 0]))
    check_finite(maps)
    import matplotlib.pyplot as plt

    axes = plt.gca()
    draw_maps(axes, maps, tokens)
    return axes


def check_finite(maps: Mapping[int, Tensor]) -> None:
    """Raise a ValueError that names the first layer with a weight that is not finite: it would look like 0."""
    for layer, weights in maps.items():
        if not weights.isfinite().all():
            raise ValueError(f"the attention weights of layer {layer} are not finite, so there is no map")


def draw_maps(
    axes: "Axes", maps: Mapping[int, Tensor], tokens: Sequence[str] | None = None, name: str = "token"
) -> None:
    """Draw maps side by side on one pair of axes, with one colour bar.

    Exact zeros are white, positive weights red, negative weights blue. The scale is the signed square root, so that a
    weight of 0.01 is visible beside a weight of 1. Maps of more than 160 rows are shrunk: a cell shows its weight of
    the largest absolute value.

    Args:
        axes: where to draw.
        maps: layer number -> maps (heads, T, T); the layers may have different numbers of heads.
        tokens: labels of the T tokens, drawn if T is at most 32.
        name: what a row or column of a map is.
    """
    from matplotlib import colormaps
    from matplotlib.colors import FuncNorm

    small = [shrink(layer.detach().float().cpu().numpy()) for layer in maps.values()]
    limit = max(float(np.abs(layer).max()) for layer in small) or 1.0
    signed = any(bool((layer < 0).any()) for layer in small)
    zoom = max(1, MAX_LABELS // small[0].shape[-1])  # enlarges short maps, so that the gaps stay narrow
    small = [layer.repeat(zoom, 1).repeat(zoom, 2) for layer in small]
    cells, heads = small[0].shape[-1], max(map(len, small))
    gap = max(1, cells // 16)
    pitch = cells + gap  # from the start of one map to the start of the next
    shape = len(small) * pitch - gap, heads * pitch - gap
    canvas = np.full(shape, 2 * limit, np.float32)  # above the scale: the gaps keep this value
    for row, layer in enumerate(small):
        for column, cell in enumerate(layer):
            canvas[row * pitch : row * pitch + cells, column * pitch : column * pitch + cells] = cell
    norm = FuncNorm(
        (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x)), -limit * signed, limit
    )
    colours = colormaps["RdBu_r" if signed else "Reds"].with_extremes(bad="white", over="0.8")  # zeros, gaps
    image = axes.imshow(np.ma.masked_equal(canvas, 0), cmap=colours, norm=norm, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, label="weight (square-root scale)")

    starts_x, starts_y = pitch * np.arange(heads), pitch * np.arange(len(small))
    length = next(iter(maps.values())).shape[-1]
    if tokens is not None and length <= MAX_LABELS:
        labels = [ascii(token)[1:-1] for token in tokens]
        places = zoom * np.arange(length) + (zoom - 1) / 2  # middles of the tokens' cells
        for axis, starts in ((axes.xaxis, starts_x), (axes.yaxis, starts_y)):
            axis.set_ticks((starts[:, None] + places).ravel(), labels * len(starts), parse_math=False)
        axes.tick_params(axis="x", labelrotation=90)
        axes.tick_params(labelsize=6, length=0)
    else:
        middle = (cells - 1) / 2
        axes.set_xticks(starts_x + middle, [f"head {i}" for i in range(len(starts_x))])
        axes.set_yticks(starts_y + middle, [f"layer {i}" for i in maps], rotation=90, va="center")
        axes.tick_params(length=0)
    axes.set_xlabel(f"attended {name}, 0 to {length - 1}   (across: heads, down: layers)")
    axes.set_ylabel(f"{name}, 0 to {length - 1}")


def maps_image(maps: Mapping[int, Tensor], tokens: Sequence[str] | None = None, name: str = "token") -> np.ndarray:
    """The picture of `draw_maps` as uint8 (height, width, 3). The current figure is not changed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads, layers = max(map(len, maps.values())), len(maps)
    labelled = tokens is not None and len(tokens) <= MAX_LABELS
    inches = 2.6 if labelled else 2.0  # per side of one map
    left, right, top, bottom = 0.9, 0.8, 0.1, 0.9 if labelled else 0.6  # fixed: a layout engine would draw twice
    width, height = inches * heads + 0.5 + left + right, inches * layers + bottom + top
    figure = Figure(figsize=(width, height), dpi=90)
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    draw_maps(axes, maps, tokens, name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def shrink(maps: np.ndarray, cells: int = MAX_CELLS) -> np.ndarray:
    """(H, T, T) -> (H, n, n) with n <= cells: each cell is the entry of largest absolute value in its block."""
    heads, length = maps.shape[:2]
    block = -(-length // cells)
    if block == 1:
        return maps
    missing = -length % block
    padded = np.pad(maps, ((0, 0), (0, missing), (0, missing)))
    blocks = padded.reshape(heads, (length + missing) // block, block, -1, block)
    largest, smallest = blocks.max((2, 4)), blocks.min((2, 4))
    return np.where(largest >= -smallest, largest, smallest)


def map_statistics(weights: Tensor, input_ids: Tensor | None = None, exact: Tensor | None = None) -> dict[str, float]:
    """A few numbers about a map, means over its heads and rows. With p_tj = |A_tj| / sum_j |A_tj|:

        entropy_nats      - sum_j p_tj ln p_tj
        distance_tokens   sum_j p_tj (t - j)
        sparsity          share of entries of the whole matrix that are exactly 0, including those after t
        outside_share     sum_j p_tj over the tokens j that are not seen exactly
        induction_share   sum_j p_tj over the tokens j < t that follow an earlier occurrence of token t: x_{j-1} = x_t
                          (Olsson et al. 2022, arXiv 2209.11895: what an induction head attends to)

    Rows without any weight are left out. A number without rows is absent.

    Args:
        weights: a causal map (..., T, T).
        input_ids: (T,) the tokens, for `induction_share`.
        exact: bool (T, T), `Attention.sees_exactly`, for `outside_share`.
    """
    length = weights.shape[-1]
    size = weights.detach().float().abs().reshape(-1, length, length)  # (H, T, T)
    mass = size.sum(-1, keepdim=True)
    p = size / mass.where(mass > 0, torch.ones_like(mass))
    full = mass[..., 0] > 0  # (H, T)

    def mean(of_rows: Tensor, rows: Tensor = full) -> float | None:
        return float(of_rows[rows].mean()) if rows.any() else None

    t, j = torch.arange(length, device=p.device)[:, None], torch.arange(length, device=p.device)
    found: dict[str, float | None] = {
        "entropy_nats": mean(-torch.special.xlogy(p, p).sum(-1)),
        "distance_tokens": mean((p * (t - j)).sum(-1)),
        "sparsity": float((size == 0).float().mean()),
    }
    if exact is not None:
        found["outside_share"] = mean((p * ~exact.to(p.device)).sum(-1))
    if input_ids is not None:
        ids = input_ids.to(p.device)
        follows = (ids[:, None] == ids.roll(1)) & (j > 0) & (j < t)
        found["induction_share"] = mean((p * follows).sum(-1), full & follows.any(-1))
    return {name: value for name, value in found.items() if value is not None}


def attention_inputs(model: Any, input_ids: Tensor) -> list[tuple[Any, Tensor]]:
    """The attentions of a `LanguageModel`, in order of depth, with their inputs x (B, T, D) for ids (B, T)."""
    inputs: dict[int, Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[id(module)] = args[0]

    hooks = [attention.register_forward_pre_hook(keep) for attention in model.attentions]
    try:
        with torch.no_grad():
            model(input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [(attention, inputs[id(attention)]) for attention in model.attentions]
