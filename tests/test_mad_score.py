"""The scores of memorization as mad-lab defines them, and the start of its weights."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from test_readme import run as in_this_process

from bsbr_pl.attention import StandardAttention
from bsbr_pl.evals.checkpoints import open_checkpoint
from bsbr_pl.model import LanguageModel

STUDY = Path(__file__).parents[1] / "study"


@pytest.mark.filterwarnings("ignore")  # of scripts, which are not tested for warnings
def test_both_accuracies_of_a_run(tmp_path, monkeypatch, one_thread):
    """One run of two steps; the accuracies again by loops over batches, classes and positions."""
    options = ("--data.vocab_size=16", "--data.num_train=256", "--data.num_test=200", "--trainer.accelerator=cpu")
    study = ["runs/16", "--configs", str(STUDY / "configs" / "mad")]
    study += ["--tasks", "memorization", "--models", "standard", "--rates", "1e-2", "--seeds", "1", "--steps", "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(STUDY)
    monkeypatch.setattr(sys, "argv", [])
    assert not in_this_process("study/run.py", [*study, "--", *options])
    import mad_score

    for _ in range(2):  # the second time, the line is there
        monkeypatch.setattr("sys.argv", ["mad_score.py", "runs/16", "--out=scores.jsonl"])
        mad_score.main()
    (line,) = map(json.loads, Path("scores.jsonl").read_text().splitlines())
    assert (line["model"], line["rate"], line["seed"], line["vocab_size"]) == ("standard", 1e-2, 1, 16)

    (checkpoint,) = Path("runs/16").rglob("last.ckpt")
    subject = open_checkpoint(checkpoint, trusted=True).subject()
    data = subject.open_data()
    data.setup("test")
    right, by_batch = [], []
    for batch in data.test_dataloader():
        asked = batch["targets"] >= 0
        guesses = subject.model(batch["input_ids"]).argmax(-1)[asked].tolist()
        answers = batch["targets"][asked].tolist()
        right += [guess == answer for guess, answer in zip(guesses, answers, strict=True)]
        shares = []
        for kind in {*guesses, *answers}:
            of_kind = [guess == kind for guess, answer in zip(guesses, answers, strict=True) if answer == kind]
            shares.append(sum(of_kind) / len(of_kind) if of_kind else 0.0)
        by_batch.append(sum(shares) / len(shares))
    assert len(by_batch) == 2  # 128 samples and 72
    assert line["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
    assert line["class_accuracy"] == pytest.approx(sum(by_batch) / 2, abs=1e-4)
    assert abs(line["accuracy"] - line["class_accuracy"]) > 2e-4


def test_the_start_of_mad_lab(monkeypatch):
    monkeypatch.setattr(LanguageModel, "_init_weights", LanguageModel._init_weights)  # undone afterwards
    runpy.run_path(str(STUDY / "mad_start.py"))
    torch.manual_seed(0)
    model = LanguageModel(StandardAttention, vocab_size=500, hidden_dim=64, num_layers=1, tie_embeddings=False)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.norm.weight.eq(1).all()
    assert model.unembedding is not None
    assert 0.99 / 8 < model.unembedding.weight.abs().max().item() <= 1 / 8
    out = model.branches[1].inner.out  # of the feed-forward network
    assert 0.99 < out.weight.abs().max().item() * out.in_features**0.5 <= 1
