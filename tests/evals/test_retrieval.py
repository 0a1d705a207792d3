"""Retrieval diagnostics: against models whose routes and answers are known, and against plain counting."""

import json
from functools import partial

import pytest
import torch
from lightning import Trainer

from bsbr_pl.__main__ import main
from bsbr_pl.attention import BSBRAttention
from bsbr_pl.data import InductionData, MQARData, SelectiveCopyData
from bsbr_pl.evals.accuracy import recall_accuracy
from bsbr_pl.evals.retrieval import as_text, ask, find_answers, retrieval
from bsbr_pl.metrics import IGNORED
from bsbr_pl.model import LanguageModel
from bsbr_pl.module import LanguageModule

KEYS, V = range(1, 9), 32  # key k has the value k + 16
ROUTED, ANSWERED = {1, 2, 3, 4, 5}, {1, 2, 3, 6}  # the keys whose chunk is found, and whose value is known


class Questions:
    """Eight pairs in chunks of two tokens, each asked once, at the start of a chunk: a data set of two batches."""

    kind = "recall"

    def loader(self, split):
        for seed in (0, 1):
            inputs, targets = torch.zeros(16, 40, dtype=torch.long), torch.full((16, 40), IGNORED)
            generator = torch.Generator().manual_seed(seed)
            for row in range(16):
                pairs, asked = (torch.randperm(8, generator=generator) + 1 for _ in range(2))
                slots = 16 + 2 * torch.randperm(12, generator=generator)[:8]
                inputs[row, 0:16:2], inputs[row, 1:16:2] = pairs, pairs + 16
                inputs[row, slots], targets[row, slots] = asked, asked + 16
            yield {"input_ids": inputs, "targets": targets}


@pytest.fixture(scope="module")
def known():
    """One layer, tokens as unit vectors: head 0 routes the keys in ROUTED to the chunk that holds them and the others
    anywhere else, head 1 has no preference; feed-forward networks know the values of the keys in ANSWERED."""
    attention = partial(BSBRAttention, chunk_size=2, overlap=False)
    model = LanguageModel(attention, V, V, num_layers=1, num_heads=2, ff_dim=V, out_init=0.0).eval()
    signs = torch.tensor([0.0 if k not in KEYS else 1.0 if k in ROUTED else -1.0 for k in range(V)])
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(V))
        model.norm.weight.fill_(1.0)
        attention, network = (branch.inner for branch in model.branches)
        attention.chunk_query.weight.copy_(20 * signs.diag())
        attention.chunk_key.weight.copy_(torch.eye(V))
        network.into.weight.copy_(torch.eye(V))
        network.out.weight.zero_()
        for key in ANSWERED:
            network.out.weight[key + 16, key] = 1.0
    return model


def test_certain_routes_are_read_as_such(known):
    found = retrieval(known, Questions())
    json.dumps(found, allow_nan=False)
    (layer,) = found["layers"]
    assert (found["questions"], layer["questions"], layer["chunk_size"], layer["layer"]) == (256, 256, 2, 0)
    assert layer["best_head"] == 0
    first, second = layer["heads"]
    assert first["hit"] == len(ROUTED) / 8
    assert second["hit"] == 0, "no chunk is preferred"
    asked = torch.cat([(batch["targets"] != IGNORED).nonzero()[:, 1] for batch in Questions().loader("test")])
    chunks = (asked // 2).float()
    assert layer["chance"] == pytest.approx(float((1 / chunks).mean()))
    assert second["rank"] == pytest.approx(float((chunks + 1).mean() / 2))
    assert [second["weight"], second["null"]] == pytest.approx(2 * [float((1 / (chunks + 1)).mean())])
    assert first["weight"] == pytest.approx(len(ROUTED) / 8, abs=0.01)
    assert layer["mean"]["hit"] == pytest.approx(first["hit"] / 2)
    assert layer["mean"]["rank"] == pytest.approx((first["rank"] + second["rank"]) / 2)


def test_the_router_missed_is_told_from_the_state_was_too_small(known):
    found = retrieval(known, Questions())
    assert found["accuracy"] == len(ANSWERED) / 8
    hit, missed = found["routed"]["hit"], found["routed"]["missed"]
    assert (hit["questions"], missed["questions"]) == (256 * 5 // 8, 256 * 3 // 8)
    assert hit["accuracy"] == pytest.approx(len(ROUTED & ANSWERED) / len(ROUTED))
    assert missed["accuracy"] == pytest.approx(len(ANSWERED - ROUTED) / (8 - len(ROUTED)))
    assert found["reach"]["near"] == {"questions": 0, "accuracy": None}
    assert found["reach"]["far"] == {"questions": 256, "accuracy": found["accuracy"]}
    (only,) = found["by_question"]
    assert only == {"start": 0, "stop": 1, "questions": 256, "accuracy": len(ANSWERED) / 8, "hit": len(ROUTED) / 8}
    assert [row["start"] for row in found["by_answer"]] == [1], "values stand at the second place of a chunk"
    text = as_text(found)
    assert "head 0 (best)  0.625" in text
    assert "256 questions, accuracy 0.500" in text


def test_the_best_rank_is_that_of_a_chunk_that_holds_the_key(known):
    """The routes again, from the map itself."""
    batch = next(iter(Questions().loader("test")))
    columns, (layer,) = ask(known, batch["input_ids"], batch["targets"])
    with torch.no_grad():
        P = known.attentions[0].chunk_map(known.branches[0].norm(known.embed(batch["input_ids"])))
    for i, question in enumerate(layer["question"].tolist()):
        row, asked, answered = (int(columns[name][question]) for name in ("row", "asked", "answered"))
        key = int(batch["input_ids"][row, asked])
        assert batch["input_ids"][row, answered - 1] == key
        assert batch["input_ids"][row, answered] == batch["targets"][row, asked] == key + 16
        weights = P[row, 0, asked, : asked // 2]
        assert layer["weight"][i, 0] == weights[answered // 2]
        assert layer["rank"][i, 0] == (len(weights) if key not in ROUTED else 1)
        assert columns["right"][question] == (key in ANSWERED)


@pytest.mark.parametrize(
    "data",
    [
        MQARData(128, [(16, 2, 8)], [(64, 8, 16), (32, 4, 16)], random_filler=True, batch_size=8),
        InductionData(8, 16, (16, 33), num_train=8, num_test=20, batch_size=8),
    ],
)
def test_answers_are_found_where_a_search_finds_them(data):
    seen = 0
    for batch in data.loader("test"):
        inputs, targets = batch["input_ids"], batch["targets"]
        found = find_answers(inputs, targets)
        for row, asked, answered in zip(*(found[name].tolist() for name in ("row", "asked", "answered")), strict=True):
            wanted = [int(inputs[row, asked]), int(targets[row, asked])]
            places = [p for p in range(1, asked + 1) if inputs[row, p - 1 : p + 1].tolist() == wanted]
            assert answered == places[-1]
            seen += 1
        assert len(found["row"]) == (targets != IGNORED).sum()
    assert seen


@pytest.mark.parametrize("name", ["bsbr", "standard"])
def test_the_parts_make_up_the_whole(make_module, name):
    """A random model, segments of two lengths, chunks that neither is a multiple of."""
    model = make_module(name).eval().model
    data = MQARData(257, [(16, 2, 8)], [(64, 8, 20), (26, 4, 20)], batch_size=8)
    found = retrieval(model, data)
    json.dumps(found, allow_nan=False)
    assert found["questions"] == 240
    longer, shorter = (one["accuracy"] for one in recall_accuracy(model, data)["slices"])
    pooled = (20 * 8 * longer + 20 * 4 * shorter) / 240
    assert found["accuracy"] == pytest.approx(pooled), "every question counts as much"
    for key in ("by_distance", "by_answer", "by_question"):
        rows = found[key]
        assert sum(row["questions"] for row in rows) == 240
        whole = sum(row["questions"] * row["accuracy"] for row in rows) / 240
        assert whole == pytest.approx(found["accuracy"])
    if name == "standard":
        assert found["chunk_size"] is None
        assert found["layers"] == []
        assert "routed" not in found
        assert "hit" not in found["by_distance"][0]
        assert "BSBR" not in as_text(found)
        return
    far = found["reach"]["far"]["questions"]
    assert 0 < far <= found["reach"]["near"]["questions"] + far == 240
    assert far == sum(row["questions"] for row in found["by_distance"] if row["start"] >= 8), "the window reaches 8"
    assert [layer["questions"] for layer in found["layers"]] == [far, far]
    assert found["routed"]["hit"]["questions"] + found["routed"]["missed"]["questions"] == far
    best = found["layers"][-1]["heads"][found["layers"][-1]["best_head"]]
    assert found["routed"]["hit"]["questions"] == pytest.approx(best["hit"] * far)
    assert all(row["stop"] <= 8 for row in found["by_answer"] + found["by_question"])
    assert 0 < best["weight"] < 1
    assert 0 < best["null"] < 1


def test_within_one_chunk_nothing_is_routed(make_module):
    data = MQARData(257, [(16, 2, 8)], [(8, 2, 20)], batch_size=8)
    found = retrieval(make_module("bsbr").eval().model, data)
    assert [layer["mean"] for layer in found["layers"]] == 2 * [dict.fromkeys(("hit", "rank", "weight", "null"))]
    assert found["reach"]["near"]["questions"] == 40
    assert found["routed"]["hit"] == {"questions": 0, "accuracy": None}
    assert "0 far questions" in as_text(found)


def test_data_without_answers_in_the_context_is_refused(make_module, make_data):
    model = make_module("bsbr").eval().model
    with pytest.raises(ValueError, match=r"retrieval needs a recall task .* not text"):
        retrieval(model, make_data())
    with pytest.raises(ValueError, match="SelectiveCopyData has no answers in the context after their keys"):
        retrieval(model, SelectiveCopyData(16, 32, 4, num_train=8, num_test=8, batch_size=8))


def test_the_command_reads_a_checkpoint_and_its_data(tmp_path, make_trainer, capsys):
    data = MQARData(64, [(16, 2, 32)], [(16, 2, 10)], batch_size=8)
    module = LanguageModule(partial(BSBRAttention, chunk_size=4), 64, hidden_dim=16, num_layers=1, num_heads=2)
    trainer: Trainer = make_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    path, out = tmp_path / "run.ckpt", tmp_path / "found.json"
    trainer.save_checkpoint(path)
    assert main(["retrieval", str(path), f"--out={out}"]) == 0
    kept = json.loads(out.read_text())
    assert kept["questions"] == 20
    assert {name: kept[name] for name in ("checkpoint", "split")} == {"checkpoint": str(path), "split": "test"}
    assert capsys.readouterr().out.strip() == as_text(kept)
    assert kept["accuracy"] == pytest.approx(recall_accuracy(module.eval().model, data)["accuracy"])
    with pytest.raises(SystemExit):
        main(["retrieval", str(tmp_path / "none.ckpt")])
    assert "none.ckpt" in capsys.readouterr().err.splitlines()[-2]
    assert main(["retrieval", str(path), "--device=auto"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["retrieval", str(path), "--device=banana"])
    assert "error: device='banana' cannot be used here: " in capsys.readouterr().err.splitlines()[-2]
