"""Accuracy: the figures of training, taken apart by document, position and recall, and put together again."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning import Trainer

from bsbr_pl.data import InductionData, MQARData, TextData
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


class Bigrams(torch.nn.Module):
    """Predicts the next token from the last one alone, by counts of a text: windows make no difference."""

    def __init__(self, tokens: np.ndarray, vocab_size: int) -> None:
        super().__init__()
        counts = np.full((vocab_size, vocab_size), 0.1)
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
        self.log_counts = torch.nn.Parameter(torch.from_numpy(np.log(counts)).float())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.log_counts[input_ids]


def last_seen(window: list[tuple[int, int]], t: int) -> int:
    """How many tokens ago the bigram of position t occurred in its window; 0 if it did not."""
    return next((t - s for s in range(t - 1, -1, -1) if window[s] == window[t]), 0)


@pytest.mark.parametrize("length", [100, 7])
def test_every_figure_of_a_text_by_hand(texts, tmp_path, length):
    data = TextData(
        str(texts), "bpe", 300, eval_context_length=length, eval_batch_size=3, cache_dir=str(tmp_path),
        val_fraction=0.3,
    )  # fmt: skip
    tokens = data.corpus.tokens("val").astype(int)
    model = Bigrams(data.corpus.tokens("train").astype(int), data.vocab_size)
    found = text_accuracy(model, data)
    x, y = tokens[:-1], tokens[1:]
    table = model.log_counts.detach().double()
    nats = -table.log_softmax(-1).numpy()[x, y]
    right = (table.argmax(-1).numpy()[x] == y).astype(float)
    size = np.array([len(data.tokenizer.decode_bytes([token])) for token in y])
    assert 0.2 < right.mean() < 0.95
    assert found["loss"] == pytest.approx(nats.mean())
    assert found["perplexity"] == pytest.approx(math.exp(nats.mean()))
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / size.sum())
    assert (found["tokens"], found["bytes"]) == (len(y), size.sum())

    document = np.cumsum(x == data.tokenizer.eos_id) - 1  # an EOS begins a document, the next one is its last target
    per_document = [np.bincount(document, values) for values in (nats, np.ones_like(nats), right, size)]
    assert found["blocks"]["nats"] == pytest.approx(per_document[0].tolist())
    assert found["blocks"]["bytes"] == per_document[3].tolist()
    for name, (above, below) in {"loss": (0, 1), "accuracy": (2, 1), "bits_per_byte": (0, 3)}.items():
        unit = math.log(2) if name == "bits_per_byte" else 1.0
        interval = np.array(ratio_interval(per_document[above], per_document[below])) / unit
        assert found["interval"][name] == pytest.approx(interval.tolist()), name

    position = np.arange(len(x)) % length
    for row in found["by_position"]:
        inside = (row["start"] <= position) & (position < row["stop"])
        assert row["loss"] == pytest.approx(nats[inside].mean())
    edges = [row["start"] for row in found["by_position"]]
    assert edges == [n for n in (0, 1, 2, 4, 8, 16, 32, 64) if n < length]

    bigrams = list(zip(x.tolist(), y.tolist(), strict=True))
    distance = np.array([last_seen(bigrams[t - p : t + 1], p) for t, p in enumerate(position)])
    assert distance.max() > 32 or length == 7
    classes = {"rest": (0, 1), "hits": (1, 1e9), "1 to 7 back": (1, 8), "8 to 31 back": (8, 32)}
    classes |= {"32 to 127 back": (32, 128)}
    rows = {row["slice"]: row for row in found["recall"]}
    assert set(rows) == {
        name for name, (start, stop) in classes.items() if ((start <= distance) & (distance < stop)).any()
    }
    for name, row in rows.items():
        inside = (classes[name][0] <= distance) & (distance < classes[name][1])
        assert row["tokens"] == inside.sum()
        assert (row["loss"], row["accuracy"]) == (
            pytest.approx(nats[inside].mean()),
            pytest.approx(right[inside].mean()),
        )


class KnowsEvenKeys(torch.nn.Module):
    """Answers the questions of MQAR about even keys rightly, and all others with token 0, which is no answer."""

    def __init__(self) -> None:
        super().__init__()
        self.confidence = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        answers = torch.zeros_like(input_ids)
        for row, answer in zip(input_ids.tolist(), answers, strict=True):
            for t, token in enumerate(row):
                answer[t] = row[row.index(token) + 1] if t and token % 2 == 0 and row.index(token) < t else 0
        return self.confidence * torch.nn.functional.one_hot(answers, 100)


def test_every_figure_of_a_task_by_hand():
    """Four questions and then eight in a sample: a sample counts by its share of right answers, a slice by its mean."""
    data = MQARData(100, [(16, 4, 8)], [(16, 4, 60), (64, 8, 40)], batch_size=8)
    found = recall_accuracy(KnowsEvenKeys(), data)
    shares = {16: [], 64: []}
    for batch in data.test_dataloader():
        for x, y in zip(batch["input_ids"], batch["targets"], strict=True):
            shares[len(x)].append(float((x[y >= 0] % 2 == 0).float().mean()))
    assert [(row["slice"], row["length"]) for row in found["slices"]] == [("T16_N4", 16), ("T64_N8", 64)]
    right, questions = 4 * sum(shares[16]) + 8 * sum(shares[64]), 60 * 4 + 40 * 8
    mean = (np.mean(shares[16]) + np.mean(shares[64])) / 2
    assert found["accuracy"] == pytest.approx(mean)
    assert abs(mean - right / questions) > 1e-3, "not the share of all questions"
    assert found["samples"] == 100
    assert found["loss"] == pytest.approx(math.log(math.exp(3) + 99) - 3 * right / questions)
    errors = {length: np.std(of) / len(of) ** 0.5 for length, of in shares.items()}
    expected = [(found["interval"]["accuracy"], mean, (errors[16] ** 2 + errors[64] ** 2) ** 0.5 / 2)]
    for row, (length, of) in zip(found["slices"], shares.items(), strict=True):
        assert row["accuracy"] == pytest.approx(np.mean(of))
        expected.append((row["interval"], np.mean(of), errors[length]))
    for (low, high), center, error in expected:
        assert low == pytest.approx(center - 1.96 * error, abs=0.2 * error)
        assert high == pytest.approx(center + 1.96 * error, abs=0.2 * error)
