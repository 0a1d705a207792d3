"""Finds where recall fails: the router chose a wrong chunk, or the state of the right chunk lost the answer.

    bsbr retrieval runs/version_0/checkpoints/best.ckpt

A question of a recall task is at the position of its key. Its answer is the token after the last earlier occurrence
of that key with the target value. An attention that routes chunks (BSBR) reads the tokens of `sees_exactly` exactly,
and older tokens only through the weights P of its `chunk_map`. If the router gives its largest weight to a wrong chunk,
the router failed. If it chose the answer's chunk and the answer is still wrong, the state of that chunk or its read
failed.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bsbr_pl.attention import Attention
from bsbr_pl.data import TokenData
from bsbr_pl.metrics import IGNORED
from bsbr_pl.model import LanguageModel
from bsbr_pl.values import number

from .analysis import aligned

Columns = dict[str, Tensor]  # one value per question
_three = partial(number, form=".3f")


def find_answers(input_ids: Tensor, targets: Tensor) -> Columns:
    """The questions of a batch, input_ids and targets (B, T) -> columns of equal length.

    Returns:
        row, asked: the position of the question; answered: the position of its answer, -1 if it has none.
    """
    row, asked = (targets != IGNORED).nonzero(as_tuple=True)
    key, value = input_ids[row, asked], targets[row, asked]
    before = torch.arange(input_ids.shape[1] - 1, device=row.device) < asked[:, None]
    first, second = input_ids[row, :-1] == key[:, None], input_ids[row, 1:] == value[:, None]
    pairs = first & second & before  # (questions, T - 1)
    last = input_ids.shape[1] - 1 - pairs.flip(1).int().argmax(1)
    return {"row": row, "asked": asked, "answered": last.where(pairs.any(1), -1)}


@torch.no_grad()
def ask(model: LanguageModel, input_ids: Tensor, targets: Tensor) -> tuple[Columns, list[Columns]]:
    """The questions of a batch, and how each BSBR layer routed those whose answer is far.

    Returns:
        the columns of `find_answers` and `right`; for each BSBR layer the columns `question` (an index into these),
        `chunks` (how many earlier ones there are) and, (questions, H) each, `rank` of the answer's chunk among them by
        weight (1 is best; equal weights share the mean of their ranks), its `weight`, and the `null` slot's.
    """
    found, layers = find_answers(input_ids, targets), []
    x = model.embed(input_ids)
    for branch in model.branches:
        if isinstance(branch.inner, Attention) and branch.inner.routes_chunks:
            layers.append(_route(branch.inner, branch.norm(x), found))
        x = branch(x)
    guesses = model.head(model.norm(x)).argmax(-1)
    return {**found, "right": (guesses == targets)[found["row"], found["asked"]]}, layers


def _route(attention: Attention, x: Tensor, found: Columns) -> Columns:
    asking, holding = found["asked"] // attention.period, found["answered"] // attention.period  # chunks
    question = ((holding >= 0) & ~_near(attention, found["asked"], found["answered"])).nonzero()[:, 0]
    asking, holding = asking[question], holding[question]
    row, asked = found["row"][question], found["asked"][question]
    weights = attention.chunk_map(x)[row, :, asked]  # (questions, H, N), 0 from the own chunk on
    own = weights.gather(-1, holding[:, None, None].expand(-1, weights.shape[1], 1))
    earlier = (torch.arange(weights.shape[-1], device=x.device) < asking[:, None])[:, None]
    larger, equal = ((weights > own) & earlier).sum(-1), ((weights == own) & earlier).sum(-1)
    return {
        "question": question,
        "chunks": asking,
        "rank": larger + (equal + 1) / 2,
        "weight": own[..., 0],
        "null": 1 - weights.sum(-1),
    }


def retrieval(model: LanguageModel, data: TokenData, split: str = "test") -> dict[str, Any]:
    """Evaluate every question of a split, and separate errors of the router from errors of the state.

    Args:
        model: in evaluation mode, on any device; any architecture.
        data: a recall task whose answers are in the context, after their keys (MQAR, induction, needle).
        split: `train`, `val` or `test`.

    Returns:
        questions (number), accuracy (share answered right);
        chunk_size (tokens, of the last layer that routes; None without one: positions are then those in the sequence);
        layers: of every layer that routes, over the questions whose answer is far, beyond what it sees exactly: layer
        (of those, from 0), chunk_size, questions, chance (hit@1 of a random choice), best_head (by hit) and, for each
        of the heads and as the mean over them: hit (share of questions whose chunk gives the answer's chunk most
        weight), rank (mean, of the answer's chunk among the earlier ones; 1 is best), weight (mean, of the answer's
        chunk) and null (mean, of the slot that retrieves nothing);
        routed: accuracy by how the best head of the last layer routed: hit and missed;
        reach: accuracy where the answer is near (what the last layer sees exactly) and far;
        by_distance (tokens from the answer to the question), by_answer and by_question (their positions in the chunk):
        rows of start <= number < stop. Each accuracy comes with its number of questions and, if a layer routes, with
        hit: the share of the far answers that the best head of the last layer hits.
        A value without questions is None. Questions whose answer is not in the context are in no class.

    Raises:
        ValueError: the data is text, or a task without answers in the context.
    """
    if data.kind == "text":
        raise ValueError("retrieval needs a recall task whose answers are in the context, not text")
    device = next(model.parameters()).device
    batches: list[Columns] = []
    routes: list[list[Columns]] = []
    seen = 0
    for batch in data.loader(split):
        columns, layers = ask(model, batch["input_ids"].to(device), batch["targets"].to(device))
        routes.append([{**layer, "question": layer["question"] + seen} for layer in layers])
        batches.append(columns)
        seen += len(columns["row"])
    found = _join(batches)
    if (found["answered"] < 0).all():
        raise ValueError(f"{type(data).__name__} has no answers in the context after their keys: use MQARData")
    layers = [_join(one) for one in zip(*routes, strict=True)]
    routers = [attention for attention in model.attentions if attention.routes_chunks]
    described = [_describe(i, one.period, layer) for i, (one, layer) in enumerate(zip(routers, layers, strict=True))]
    return {
        "questions": seen,
        "accuracy": float(found["right"].float().mean()),
        "chunk_size": routers[-1].period if routers else None,
        "layers": described,
        **_split(found, routers, layers, described),
    }


def _near(attention: Attention, asked: Tensor, answered: Tensor) -> Tensor:
    """Whether a question sees its answer exactly."""
    length = int(asked.max()) + 1 if len(asked) else 0
    return attention.sees_exactly(length).to(asked.device)[asked, answered]


def _join(parts: Sequence[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def _describe(number: int, chunk_size: int, layer: Columns) -> dict[str, Any]:
    hit = (layer["rank"] == 1).float()
    columns = {"hit": hit, "rank": layer["rank"], "weight": layer["weight"], "null": layer["null"]}
    known = len(hit) > 0
    by_head = {name: column.mean(0).tolist() if known else [None] * hit.shape[1] for name, column in columns.items()}
    return {
        "layer": number,
        "chunk_size": chunk_size,
        "questions": len(hit),
        "chance": float((1 / layer["chunks"]).mean()) if known else None,
        "best_head": int(hit.mean(0).argmax()) if known else None,
        "heads": [dict(zip(by_head, values, strict=True)) for values in zip(*by_head.values(), strict=True)],
        "mean": {name: float(column.mean()) if known else None for name, column in columns.items()},
    }


def _split(
    found: Columns, routers: Sequence[Attention], layers: Sequence[Columns], described: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The accuracy of classes of questions."""
    asked, answered, right = found["asked"], found["answered"], found["right"]
    placed, chunk = answered >= 0, routers[-1].period if routers else int(asked.max()) + 1
    near = placed & _near(routers[-1], asked, answered) if routers else placed
    far = placed & ~near
    hit = torch.full_like(right, False)
    if layers and described[-1]["best_head"] is not None:
        hit[layers[-1]["question"]] = layers[-1]["rank"][:, described[-1]["best_head"]] == 1

    def counted(inside: Tensor) -> dict[str, Any]:
        return {"questions": int(inside.sum()), "accuracy": _share(right[inside])}

    def figures(inside: Tensor) -> dict[str, Any]:
        found = counted(inside)
        if routers:
            found["hit"] = _share(hit[inside & far])
        return found

    def classes(numbers: Tensor) -> list[dict[str, Any]]:
        rows = []
        edges = [0, *(2**i for i in range(int(numbers[placed].max()).bit_length() + 1))]
        for start, stop in pairwise(edges):
            inside = (numbers >= start) & (numbers < stop) & placed
            if inside.any():
                rows.append({"start": start, "stop": stop, **figures(inside)})
        return rows

    split: dict[str, Any] = {}
    if routers:
        split["routed"] = {"hit": counted(far & hit), "missed": counted(far & ~hit)}
        split["reach"] = {"near": counted(near), "far": counted(far)}
    split["by_distance"] = classes(asked - answered)
    split["by_answer"] = classes(answered % chunk)
    split["by_question"] = classes(asked % chunk)
    return split


def _share(of: Tensor) -> float | None:
    return float(of.float().mean()) if len(of) else None


def as_text(found: dict[str, Any]) -> str:
    """The tables of what `retrieval` found."""
    chunk = found["chunk_size"]
    where = f"chunk of {chunk} tokens" if chunk else "sequence"
    parts = [f"{found['questions']:,} questions, accuracy {_three(found['accuracy'])}"]
    for layer in found["layers"]:
        shown = {}
        if layer["questions"]:
            for i, head in enumerate(layer["heads"]):
                shown[f"head {i} (best)" if i == layer["best_head"] else f"head {i}"] = head
        shown["mean"] = layer["mean"]
        rows = [[f"BSBR layer {layer['layer']}", "hit@1", "rank", "weight", "null"]]
        for name, head in shown.items():
            rows.append([name, *(_three(head[column]) for column in ("hit", "rank", "weight", "null"))])
        chance = f"{layer['questions']:,} far questions; chance is {_three(layer['chance'])}"
        parts.append(f"{aligned(rows)}\n{chance}")
    for key, title in (("routed", "router (best head of the last layer)"), ("reach", "answer in")):
        if key in found:
            rows = [[title, "questions", "accuracy"]]
            for kind, one in found[key].items():
                rows.append([kind, f"{one['questions']:,}", _three(one["accuracy"])])
            parts.append(aligned(rows))
    for key, title in (
        ("by_distance", "tokens from answer to question"),
        ("by_answer", f"answer's position in the {where}"),
        ("by_question", f"question's position in the {where}"),
    ):
        rows = [[title, "questions", "accuracy"] + (["hit@1"] if chunk else [])]
        for one in found[key]:
            first, last = one["start"], one["stop"] - 1
            span = str(first) if first == last else f"{first} to {last}"
            accuracies = [_three(one[name]) for name in ("accuracy", "hit") if name in one]
            rows.append([span, f"{one['questions']:,}", *accuracies])
        parts.append(aligned(rows))
    return "\n\n".join(parts)
