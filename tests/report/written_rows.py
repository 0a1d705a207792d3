"""Rows that are written down rather than measured, for the tests of the report."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

CPU = {"cpu": "a processor", "threads": 2, "device": "cpu", "torch": "2.13", "dtype": "float32"}
CPU |= {"commit": {"commit": "0123456789abcdef", "changed": False}}
GPU = CPU | {"device": "cuda:0", "gpu": "a GPU", "dtype": "bfloat16"}
LOWEST, SIZE = 100, 10  # documents, bytes of each
VERSION = 2
CHUNKED = ("bsbr", "linear", "delta_net", "gated_delta_net", "gau")

Row = dict[str, Any]


def about(name: str = "standard", seed: int | None = 0, path: str | None = None, **changes: Any) -> Row:
    """`about` of a finished run of 200 steps; changes by path, as `run__steps=50`."""
    architecture = f"{name}(chunk_size=8)" if name in CHUNKED else name
    found: Row = {
        "checkpoint": {
            "name": path or f"runs/{name}_{seed}/last.ckpt",
            "digest": f"{name}-{seed}-{path}",
            "body": f"body of {name}",
        },
        "architecture": architecture,
        "attention": [name],
        "parameters": 12345,
        "sizes": {"vocab_size": 257, "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "ff_dim": 64},
        "seed": seed,
        "step": 200,
        "data": {
            "class": "TextData",
            "kind": "text",
            "arguments": {"source": "texts", "context_length": 256, "batch_size": 8},
            "fingerprint": "f" * 32,
            "tokenizer": "bytes",
            "train_lengths": {"256": 1},
            "validation_length": 256,
            "trained_length": 256,
        },
        "run": {"finished": True, "steps": 200, "planned_steps": 200, "tokens": 409600, "batch": 8, "flops": 1e9},
        "config": {"model.learning_rate": 0.01, "data.context_length": 256, "data.batch_size": 8},
        "command": "evaluate.py runs",
    }
    for name, value in changes.items():
        *places, last = name.split("__")
        of = found
        for place in places:
            of = of[place]
        of[last] = value
    run = found["run"]
    words = f"{run['steps']:,} steps" if run["finished"] else f"stopped at {run['steps']} of 200 steps"
    run.setdefault("length", words)
    run.setdefault("status", "finished" if run["finished"] else words)
    run.setdefault("marks", [] if run["finished"] else [words])
    run.setdefault("budget", [words, run["tokens"], run["batch"], run.get("initial_weights")])
    return found


def text(bits: float, documents: int = LOWEST, noise: float = 0.0, seed: int = 0, **more: Any) -> Row:
    """Values of a text whose documents have `bits` a byte, more or less."""
    nats = (bits + noise * np.random.default_rng(seed).normal(size=documents)) * SIZE * math.log(2)
    bits = float(nats.sum() / documents / SIZE / math.log(2))
    interval = {"loss": [bits - 0.1, bits + 0.1], "accuracy": [0.4, 0.6], "bits_per_byte": [bits - 0.01, bits + 0.01]}
    slices = ("rest", "hits", "1 to 7 back", "8 or more back")
    return {
        "loss": bits,
        "perplexity": math.exp(bits),
        "accuracy": 0.5,
        "bits_per_byte": bits,
        "tokens": SIZE * documents,
        "bytes": SIZE * documents,
        "documents": documents,
        "interval": interval,
        "blocks": {"nats": nats.tolist(), "bytes": [SIZE] * documents},
        "by_position": [{"start": n, "stop": 2 * n or 1, "loss": bits + 1 / (1 + n)} for n in (0, 1, 2, 4, 8, 16, 32)],
        "recall": [{"slice": s, "tokens": 9, "loss": bits / i, "accuracy": i / 5} for i, s in enumerate(slices, 1)],
    } | more


def recall(right: float, lengths: tuple[int, ...] = (64, 128), **more: Any) -> Row:
    """Values of a recall task, a thousandth less at each length."""
    slices = []
    for n in lengths:
        share = right - n / 1000
        slices.append({"slice": f"T{n}_N4", "length": n, "accuracy": share, "interval": [share - 0.03, share + 0.03]})
    interval = {"accuracy": [right - 0.1, right]}
    return {"loss": 1.0, "accuracy": right, "samples": 40, "interval": interval, "slices": slices} | more


def cost(length: int, power: float = 1.0, scale: float = 1e-6, rounds: int = 5) -> Row:
    """Values of costs that grow as length^power."""
    at = scale * length**power

    def timing(seconds: float) -> Row:
        values = [seconds * (1 + 0.02 * i) for i in range(rounds)]
        return {"seconds": values[rounds // 2], "interval": [values[0], values[-1]], "samples": values}

    times = {"forward": timing(at), "training": timing(3 * at), "decode": timing(at / length)}
    return times | {"forward_bytes": 1000 * length, "training_bytes": 4000 * length, "forward_flops": 10**9 * at,
                    "state_bytes": 64 * length}  # fmt: skip


def certificate(passed: bool = True) -> Row:
    checks = [{"name": "suffix_0", "measured": 0.0 if passed else 0.25, "limit": 1e-8, "passed": passed}]
    checks.append({"name": "random_tokens", "measured": -0.5, "limit": 4.0, "passed": True})
    return {"passed": passed, "length": 19, "checks": checks}


def training(seed: int = 0, last: float = 1.5, **more: Any) -> Row:
    metrics = {"val/loss": {"step": [99, 199], "seconds": [5.0, 10.0 + seed], "value": [2.0, last]}}
    metrics["flops/step_flops"] = {"step": [9], "seconds": [1.0], "value": [1e9]}
    environment = {"device": "cpu", "cpu": "a processor", "threads": 2}
    return {"metrics": metrics, "seconds": 10.0, "environment": environment, "precision": "32-true"} | more


def picture() -> Row:
    stream = io.BytesIO()
    Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(stream, "png")
    return {"png": base64.b64encode(stream.getvalue()).decode(), "caption": "On 32 tokens. White is exactly 0."}


class Bench:
    """Rows of some checkpoints, told by their `about`."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, one: Row, kind: str, values: Row, environment: Any = CPU, **more: Any) -> None:
        checkpoint = one["checkpoint"]["body" if kind == "cost" else "digest"]
        if kind in ("text", "recall"):
            more = {"split": "val", "data": one["data"]["fingerprint"]} | more
        identity = {"kind": kind, "checkpoint": checkpoint, "version": VERSION} | more
        identity |= {} if kind in ("map", "training") else {"environment": environment}
        self.rows.append({"schema": 3, "identity": identity, "about": one, "values": values})

    def problem(self, name: str, words: str, about: Row | None = None, **of: Any) -> None:
        identity = {"kind": "problem", "checkpoint": name, "of": {"kind": "checkpoint"} | of}
        self.rows.append({"schema": 3, "identity": identity, "about": about or {"checkpoint": {"name": name}},
                          "values": {"problem": words}})  # fmt: skip

    def measured(self, one: Row, bits: float, environment: Any = CPU, passed: bool = True, **more: Any) -> None:
        self.add(one, "certificate", certificate(passed), environment)
        if passed:
            self.add(one, "text", text(bits, **more), environment, length=256)
