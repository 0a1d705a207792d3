"""Accuracy: the figures of training, taken apart by document, position and recall, and put together again."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning import Trainer

from bsbr_pl.data import InductionData, TextData
from bsbr_pl.evals.accuracy import recall_accuracy, text_accuracy
from bsbr_pl.values import ratio_interval


@pytest.fixture(scope="module")
def trained(make_module):
    torch.manual_seed(0)
    module = make_module("linear")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def validated(module, data) -> dict[str, float]:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(enable_model_summary=False, **quiet).validate(module, data, verbose=False)[0]


@pytest.mark.parametrize("eval_context_length", [32, 50, 7])
def test_the_whole_equals_training_and_the_sum_of_its_parts(trained, make_data, eval_context_length):
    data = make_data(eval_context_length=eval_context_length)
    data.prepare_data()
    found = text_accuracy(trained.model, data)
    for name, value in validated(trained, data).items():
        assert found[name.removeprefix("val/")] == pytest.approx(value, abs=1e-6), name

    assert found["bytes"] == len(data.text("val"))
    assert found["tokens"] == len(data.corpus.tokens("val")) - 1, "every token but the first is predicted"
    assert found["documents"] == len(found["blocks"]["nats"])
    nats, size = np.array(found["blocks"]["nats"]), np.array(found["blocks"]["bytes"])
    assert nats.sum() / found["tokens"] == pytest.approx(found["loss"])
    assert nats.sum() / math.log(2) / size.sum() == pytest.approx(found["bits_per_byte"])

    positions = found["by_position"]
    assert positions[0]["start"] == 0
    assert positions[-1]["stop"] == eval_context_length
    assert all(a["stop"] == b["start"] for a, b in pairwise(positions))

    recall = {row["slice"]: row for row in found["recall"]}
    assert recall["rest"]["tokens"] + recall["hits"]["tokens"] == found["tokens"]
    by_distance = [row for name, row in recall.items() if "back" in name]
    assert sum(row["tokens"] for row in by_distance) == recall["hits"]["tokens"]
    total = recall["rest"]["tokens"] * recall["rest"]["loss"] + recall["hits"]["tokens"] * recall["hits"]["loss"]
    assert total / found["tokens"] == pytest.approx(found["loss"])

    for name, (low, high) in found["interval"].items():
        assert low <= found[name] <= high, name


def test_a_document_gets_its_own_tokens(trained, make_data):
    """Against the documents one by one, in a context of one token, where the cut into windows makes no difference."""
    data = make_data(eval_context_length=1)
    data.prepare_data()
    found = text_accuracy(trained.model, data)
    tokens = torch.from_numpy(data.corpus.tokens("val").astype(np.int64))
    with torch.no_grad():
        logits = trained.model(tokens[:-1, None])[:, 0].double()
    nats = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    offsets = data.documents("val")
    expected = [float(nats[start - 1 : stop - 1].sum()) for start, stop in pairwise(offsets)]
    assert found["blocks"]["nats"] == pytest.approx(expected, rel=1e-5)
    assert found["blocks"]["bytes"] == [stop - start - 1 for start, stop in pairwise(offsets)]


def test_many_documents_are_joined_with_their_neighbours(trained, make_data, monkeypatch):
    data = make_data()
    data.prepare_data()
    single = text_accuracy(trained.model, data)
    monkeypatch.setattr("bsbr_pl.evals.accuracy.MAX_BLOCKS", 2)
    joined = text_accuracy(trained.model, data)
    assert 1 < len(joined["blocks"]["nats"]) <= 2 < len(single["blocks"]["nats"])
    assert sum(joined["blocks"]["nats"]) == pytest.approx(sum(single["blocks"]["nats"]))
    assert joined["loss"] == single["loss"]
    assert joined["documents"] == single["documents"]


def test_a_text_of_one_document_is_cut_into_equal_parts(trained, tmp_path):
    """Otherwise its interval would have the width 0, which looks like certainty."""
    (tmp_path / "book.txt").write_text("".join(f"line {i * i}\n" for i in range(500)))
    data = TextData(str(tmp_path / "book.txt"), "bytes", eval_context_length=1, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    found = text_accuracy(trained.model, data)
    assert found["documents"] == 1
    tokens = torch.from_numpy(data.corpus.tokens("val").astype(np.int64))
    with torch.no_grad():
        logits = trained.model(tokens[:-1, None])[:, 0].double()
    nats = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    edges = [len(nats) * i // 100 for i in range(101)]
    assert found["blocks"]["nats"] == pytest.approx([float(nats[a:b].sum()) for a, b in pairwise(edges)], rel=1e-5)
    assert found["blocks"]["bytes"] == [b - a - (b == edges[-1]) for a, b in pairwise(edges)]
    low, high = found["interval"]["loss"]
    assert low < found["loss"] < high


def test_the_interval_is_that_of_resampled_documents():
    random = np.random.default_rng(0)
    size = random.integers(1, 50, 400)
    nats = size * random.normal(2, 0.5, 400)
    low, high = ratio_interval(nats, size)
    rate = nats.sum() / size.sum()
    error = math.sqrt(((nats - rate * size) ** 2).sum()) / size.sum()  # the ratio's standard error, by linearization
    assert low == pytest.approx(rate - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(rate + 1.96 * error, abs=0.15 * error)


def test_recall_by_slice_equals_training(make_module):
    module = make_module("standard")
    data = InductionData(vocab_size=16, context_length=16, test_lengths=[8, 16, 24], num_train=64, num_test=40)
    found = recall_accuracy(module.eval().model, data, split="val")
    theirs = validated(module, data)
    assert found["accuracy"] == pytest.approx(theirs["val/accuracy"])
    assert found["loss"] == pytest.approx(theirs["val/loss"], abs=1e-6)
    assert [(row["slice"], row["length"]) for row in found["slices"]] == [("T8", 8), ("T16", 16), ("T24", 24)]
    assert found["samples"] == 120
    for row in found["slices"]:
        assert row["accuracy"] == pytest.approx(theirs[f"val/accuracy_{row['slice']}"])
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
