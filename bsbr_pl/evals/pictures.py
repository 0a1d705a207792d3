"""The attention map of a checkpoint as a small picture, and the curve of its training."""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from bsbr_pl.data import TokenData
from bsbr_pl.model import LanguageModel
from bsbr_pl.utils.visualization import attention_inputs, check_finite, maps_image

MAP_TOKENS, MAP_LAYERS, MAP_HEADS = (128, 64, 32), 4, 4
MAP_BYTES = 60_000
COLOURS = 48
POINTS = 1000  # of each metric


@torch.no_grad()
def draw_map(model: LanguageModel, data: TokenData, name: str) -> dict[str, Any]:
    """The map of at most four layers and heads on the start of the first validation sample; values of a `map` row.

    Raises:
        ValueError: an attention has no map, or one that is not finite.
    """
    ids = next(iter(data.loader("val")))["input_ids"][:1].to(model.embedding.weight.device)
    for tokens in MAP_TOKENS:
        shown = ids[:, :tokens]
        layers = attention_inputs(model.eval(), shown)
        maps = {}
        for i in sorted({round(i) for i in np.linspace(0, len(layers) - 1, MAP_LAYERS)}):
            attention, x = layers[i]
            maps[i] = attention.attention_map(x)[0, :MAP_HEADS]
        check_finite(maps)
        png = _png(maps_image(maps))
        if len(png) <= MAP_BYTES:
            break
    else:
        raise ValueError(f"its picture has {len(png):,} bytes, more than {MAP_BYTES:,}")
    chosen = f"Layers {', '.join(map(str, maps))}; the first {MAP_HEADS} heads. " if len(maps) < len(layers) else ""
    caption = f"{name}, on the first {shown.shape[1]} tokens of the validation split. {chosen}White is exactly 0."
    return {"png": base64.b64encode(png).decode(), "caption": caption}


def _png(image: np.ndarray) -> bytes:
    """A PNG with few colours, so that it stays small."""
    stream = io.BytesIO()
    few = Image.fromarray(image).quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(stream, "png", optimize=True)
    return stream.getvalue()


def course(record: Mapping[str, Any]) -> dict[str, Any]:
    """The validation metrics of a training, and the FLOPs of a step, from its record; values of a `training` row."""
    metrics = {
        name: _thinned(columns)
        for name, columns in (record.get("metrics") or {}).items()
        if name.startswith("val/") or name == "flops/step_flops"
    }
    where = dict(record.get("environment") or {})
    if record.get("git"):
        where["commit"] = record["git"]
    return {
        "metrics": metrics,
        "seconds": record.get("seconds"),
        "environment": where,
        "precision": record.get("run", {}).get("arguments", {}).get("trainer.precision"),
        "processes": where.get("processes"),
    }


def _thinned(columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    """At most `POINTS` points at equal distances, the last among them."""
    count = len(columns["value"])
    every = max(1, math.ceil(count / POINTS))
    first = (count - 1) % every
    return {name: list(values)[first::every] for name, values in columns.items()}
