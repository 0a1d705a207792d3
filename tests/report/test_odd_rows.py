"""Rows that pass the schema's check and still are odd: the report is drawn, and nothing is invented."""

import copy
import csv
from typing import Any

import pytest
from written_rows import Bench, about, certificate, cost, picture, recall, text, training

from bsbr_pl.report import warnings, write_report


def rows(kind: str) -> list[dict[str, Any]]:
    """Of two checkpoints: certificates, accuracies, and rows of a kind; "" for all kinds."""
    bench = Bench()
    for name, seed in (("bsbr", 0), ("standard", 1)):
        one = about(name, seed)
        task = about(name, 7, data__kind="recall", data__fingerprint="0" * 32, data__validation_length=None)
        bench.add(one, "certificate", certificate())
        bench.add(one, "text", text(1.5, by_position=[], recall=[]), length=256)
        for made, values in (("training", training()), ("map", picture())):
            bench.add(one, made, values)
        bench.add(task, "recall", recall(0.5))
        for length in (2048, 4096):
            bench.add(one, "cost", {"training": cost(length)["training"]}, length=length, rounds=5)
    kept = ("certificate", "text", kind)
    return copy.deepcopy([row for row in bench.rows if not kind or row["identity"]["kind"] in kept])


LAYER = {"layer": 0, "chunk_size": 4, "questions": 3, "chance": None, "best_head": 0, "heads": [{"hit": None}]}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "no environment": ("", {"identity.environment": None}),
    "no data": ("", {"identity.data": None}),
    "no version": ("", {"identity.version": None}),
    "nothing said of it": ("", {"about": {}}),
    "an architecture alone": ("", {"about": {"architecture": "x", "checkpoint": {"name": "a", "digest": "b"}}}),
    "no run": ("", {"about.run": None}),
    "no data said": ("", {"about.data": None}),
    "no steps": ("", {"about.run": {"finished": True}}),
    "a large seed": ("", {"about.seed": 10**40}),
    "failed without a failed check": ("certificate", {"values.passed": False}),
    "no checks": ("certificate", {"values.checks": []}),
    "failed without checks": ("certificate", {"values": {"passed": False, "length": 0, "checks": []}}),
    "no number is known": ("text", {"values.bits_per_byte": None, "values.loss": None, "values.accuracy": None}),
    "empty intervals": ("text", {"values.interval": {"loss": [], "accuracy": [], "bits_per_byte": []}}),
    "half an interval": ("text", {"values.interval": {"loss": [1.0], "accuracy": [None, 1.0], "bits_per_byte": [1.0]}}),
    "no blocks": ("text", {"values.blocks": {"nats": [], "bytes": []}}),
    "blocks of nothing": ("text", {"values.blocks": {"nats": [1.0], "bytes": [0]}}),
    "blocks of other sizes": ("text", {"values.blocks": {"nats": [1.0, 2.0], "bytes": [1.0]}}),
    "no positions": ("text", {"values.by_position": [], "values.recall": []}),
    "a position at 0": ("text", {"values.by_position": [{"start": 0, "stop": 0, "loss": 1.0}] * 2}),
    "no length": ("text", {"identity.length": None}),
    "a length of 0": ("text", {"identity.length": 0}),
    "no slices": ("recall", {"values.slices": []}),
    "slices of no length": ("recall", {"values.slices": [{"slice": "a", "accuracy": 0.5, "interval": [0, 1]}] * 2}),
    "another retrieval": ("recall", {"values.retrieval": {"layers": 3}}),
    "a retrieval of a layer alone": ("recall", {"values.retrieval": {"layers": [LAYER]}}),
    "costs of no length": ("cost", {"identity.length": 0}),
    "costs below 0": ("cost", {"values.forward": {"seconds": -1.0, "interval": [-1.0, -1.0], "samples": [-1.0]}}),
    "a time without samples": ("cost", {"values.forward": {"seconds": 1.0, "interval": [], "samples": []}}),
    "a time of nothing": ("cost", {"values.forward": {"seconds": None, "interval": [None, None], "samples": [None]}}),
    "memory of nothing": ("cost", {"values.training_bytes": 0, "values.forward_bytes": None}),
    "no costs": ("cost", {"values": {}}),
    "no course": ("training", {"values.metrics": {}}),
    "a course of nothing": ("training", {"values.metrics": {"val/loss": {"step": [], "value": []}}}),
    "a course of null": ("training", {"values.metrics": {"val/loss": {"step": [None] * 2, "value": [None] * 2}}}),
    "a course of two lengths": ("training", {"values.metrics": {"val/loss": {"step": [1, 2, 3], "value": [1.0, 2.0]}}}),
    "another environment": ("training", {"values.environment": {"versions": 3, "device": [1]}}),
    "no base64": ("map", {"values.png": "no base64 at all!"}),
    "no picture": ("map", {"values.png": ""}),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_rows_are_drawn(tmp_path, odd):
    kind, changes = ODD[odd]
    found = rows(kind)
    for row in found:
        for path, value in changes.items() if kind in ("", row["identity"]["kind"]) else ():
            *places, last = path.split(".")
            of = row
            for place in places:
                of = of[place] if of else {}
            if path == "identity.data" and row["identity"]["kind"] not in ("text", "recall"):
                continue
            of[last] = value
    assert write_report(found, tmp_path).read_text().rstrip().endswith("</html>")
    assert all(isinstance(words, str) for words in warnings(found))
    if kind in ("recall", "cost", "training", "map"):  # what is sound beside them is shown as ever
        shown = csv.DictReader(
            (tmp_path / "tables" / f"first_E1_D{1 + (kind == 'recall')}_val.csv").read_text().splitlines()
        )
        values = {row["architecture"]: float(row["bits per byte"]) for row in shown if row["bits per byte"]}
        assert values == pytest.approx({"bsbr(chunk_size=8)": 1.5, "standard": 1.5})
