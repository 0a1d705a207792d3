"""Accuracy of trained models: on a whole text with intervals over documents, and on recall tasks."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsbr_pl.data import TextData, TokenData, associative_recall_hits
from bsbr_pl.metrics import IGNORED, TokenMetrics, token_metrics, token_nats
from bsbr_pl.model import LanguageModel
from bsbr_pl.values import FEW_DOCUMENTS, mean_interval, ratio_interval

MAX_BLOCKS = 1000  # units that intervals are drawn over; more documents are joined with their neighbours
TEXT_BLOCKS = 100  # parts of a text that has few documents
HIT_DISTANCES = (1, 8, 32, 128, 512)  # tokens; the last class has no end


def text_accuracy(model: LanguageModel, data: TextData, split: str = "val") -> dict[str, Any]:
    """Predict every token of a split once, in windows of `data.eval_context_length`.

    Args:
        model: in evaluation mode, on any device.
        data: with `prepare_data` done.
        split: `train`, `val` or `test`.

    Returns:
        loss (nats a token), perplexity, accuracy, bits_per_byte; tokens, bytes, documents;
        interval: loss, accuracy and bits_per_byte -> [low, high], 95 %, by bootstrap over the blocks;
        blocks: nats and bytes of each document, to compare models by; of up to 1000 groups of neighbouring documents,
            if there are more; of 100 parts of the text, if there are fewer than 5 documents;
        by_position: {"start", "stop", "loss"}: tokens with start <= tokens of context before the last < stop;
        recall: by the distance at which the token's bigram was last seen in its context (see
        `associative_recall_hits`): {"slice", "tokens", "loss", "accuracy"} of `rest`, `hits` and each class of hits.
    """
    offsets = np.asarray(data.documents(split))
    starts = _blocks(offsets)
    sums = np.zeros((len(starts), 4))  # nats, tokens, right, bytes of each block
    length = data.eval_context_length
    edges = [0, *(2**i for i in range((length - 1).bit_length()))]  # of positions: 0, 1, 2, 4, 8, ...
    positions, hits = np.zeros((len(edges), 3)), np.zeros((1 + len(HIT_DISTANCES), 3))  # nats, tokens, right
    device = next(model.parameters()).device
    token_bytes = torch.as_tensor(data.tokenizer.token_bytes).to(device)
    for batch, logits in _predictions(model, data, split):
        targets, counted = batch["targets"], batch["targets"] != IGNORED
        nats, right = token_nats(logits, targets), logits.argmax(-1) == targets
        position = torch.arange(targets.shape[1], device=device).expand_as(targets)
        place = batch["index"][:, None] + 1 + position  # in the stream, of the target
        block = np.searchsorted(starts, place[counted].cpu().numpy(), "right") - 1
        columns = (nats[counted], torch.ones_like(nats[counted]), right[counted], token_bytes[targets[counted]])
        sums += _sums(columns, block.clip(0), len(sums))
        positions += _sums(columns[:3], np.digitize(position[counted].cpu(), edges) - 1, len(edges))
        distance = associative_recall_hits(batch["input_ids"], targets)[counted]
        hits += _sums(columns[:3], np.digitize(distance.cpu(), HIT_DISTANCES), len(hits))
    by_position = []
    for (start, stop), (total, count, _) in zip(pairwise([*edges, length]), positions, strict=True):
        if count:
            by_position.append({"start": start, "stop": stop, "loss": total / count})
    recall = []
    for name, (total, count, hit) in zip(_hit_names(), [hits[0], hits[1:].sum(0), *hits[1:]], strict=True):
        if count:
            recall.append({"slice": name, "tokens": int(count), "loss": total / count, "accuracy": hit / count})
    block_nats, block_tokens, block_right, block_bytes = sums.T
    figures = token_metrics(*torch.from_numpy(sums.sum(0)))
    return {
        **{name: float(value) for name, value in figures.items()},
        "tokens": int(block_tokens.sum()),
        "bytes": int(block_bytes.sum()),
        "documents": len(offsets) - 1,
        "interval": {
            "loss": ratio_interval(block_nats, block_tokens),
            "accuracy": ratio_interval(block_right, block_tokens),
            "bits_per_byte": ratio_interval(block_nats, math.log(2) * block_bytes),
        },
        "blocks": {"nats": block_nats.tolist(), "bytes": block_bytes.tolist()},
        "by_position": by_position,
        "recall": recall,
    }


def recall_accuracy(model: LanguageModel, data: TokenData, split: str = "test") -> dict[str, Any]:
    """The share of questions of a recall task that are answered correctly.

    Every sample of a slice counts as much, and every slice of the task, whatever its number of questions.

    Returns:
        loss (nats a question); accuracy, the mean over slices; samples; interval: accuracy -> [low, high], 95 %, by
        bootstrap over the samples of each slice; slices: {"slice", "length" (tokens), "accuracy", "interval"} for each
        slice, whose accuracy is the mean over samples of the share of a sample's questions.
    """
    metrics = TokenMetrics().to(next(model.parameters()).device)
    by_slice: dict[int, list[np.ndarray]] = defaultdict(list)
    lengths: dict[int, int] = {}
    for batch, logits in _predictions(model, data, split):
        targets, counted = batch["targets"], batch["targets"] != IGNORED
        metrics.update(logits, targets)
        right = ((logits.argmax(-1) == targets) & counted).sum(1) / counted.sum(1)
        for i in batch["slice"].unique().tolist():
            by_slice[i].append(right[batch["slice"] == i].cpu().double().numpy())
            lengths[i] = targets.shape[1]
    figures, shares = metrics.compute(), []
    slices: list[dict[str, Any]] = []
    for i, parts in by_slice.items():
        share = np.concatenate(parts)
        found = {"length": lengths[i], "accuracy": float(share.mean()), "interval": mean_interval([share])}
        slices.append({"slice": data.slice_names[i], **found})
        shares.append(share)
    return {
        "loss": float(figures["loss"]),
        "accuracy": fmean(one["accuracy"] for one in slices),
        "samples": sum(map(len, shares)),
        "interval": {"accuracy": mean_interval(shares)},
        "slices": slices,
    }


def _blocks(offsets: np.ndarray) -> np.ndarray:
    """The first token of each unit of the interval, from the offsets (documents + 1,) of documents in the stream."""
    count = len(offsets) - 1
    if count < FEW_DOCUMENTS:
        parts = max(1, min(TEXT_BLOCKS, offsets[-1] - offsets[0]))
        return np.linspace(offsets[0], offsets[-1], parts, endpoint=False).astype(np.int64)
    return offsets[: -1 : -(-count // MAX_BLOCKS)]


@torch.no_grad()
def _predictions(model: LanguageModel, data: TokenData, split: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Every batch of a split with its logits, on the model's device."""
    device = next(model.parameters()).device
    for loaded in data.loader(split):
        batch = {name: tensor.to(device) for name, tensor in loaded.items()}
        yield batch, model(batch["input_ids"])


def _sums(columns: Sequence[Tensor], where: np.ndarray, count: int) -> np.ndarray:
    """(count, columns): sums of columns (n,), each of the n values at its place `where`."""
    return np.stack([np.bincount(where, values.cpu().double().numpy(), count) for values in columns], 1)


def _hit_names() -> list[str]:
    """`rest`, `hits` and the classes of hits by their distance."""
    ranges = [f"{start} to {stop - 1} back" for start, stop in pairwise(HIT_DISTANCES)]
    return ["rest", "hits", *ranges, f"{HIT_DISTANCES[-1]} or more back"]
