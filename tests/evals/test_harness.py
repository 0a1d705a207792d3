"""A model of the lm-evaluation-harness: its numbers are those of evaluate.py, and of plain sums."""

import json
import math
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Trainer

from bsbr_pl.__main__ import main
from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import InductionData, TextData
from bsbr_pl.data.tokenizer import ByteTokenizer
from bsbr_pl.evals.accuracy import text_accuracy
from bsbr_pl.module import LanguageModule

pytest.importorskip("lm_eval", reason="needs the extra [lm-eval]")

from bsbr_pl.evals.harness import HarnessModel

L, EOS = 16, 256  # tokens of a window; the end of text in bytes
TEXT = "def add(a, b):\n    return a + b + 1\nprint(add(2, 3), 'é')\n"


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def stirred(module: LanguageModule) -> LanguageModule:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def model(make_module):
    return stirred(make_module("bsbr")).model


@pytest.fixture(scope="module")
def harness(model):
    return HarnessModel(model, ByteTokenizer(), L)


@torch.no_grad()
def log_probabilities(model, context: list[int], continuation: list[int]) -> torch.Tensor:
    """ln p of each token of a continuation, from the context's first token on."""
    ids = torch.tensor([context + continuation])
    found = model(ids)[0].double().log_softmax(-1)
    return found[len(context) - 1 : -1].gather(1, ids[0, len(context) :, None])[:, 0]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("length", [L - 1, 3 * L])
def test_rolling_is_what_evaluate_measures(name, length, make_module, tmp_path):
    """Of one document, without its end: in one window, and in windows that are full."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    (tmp_path / "train" / "a.txt").write_text("another text\n" * 20)
    text = TEXT.replace("é", "e")[:length]
    (tmp_path / "val" / "a.txt").write_text(text)
    data = TextData(str(tmp_path), "bytes", context_length=L, batch_size=4, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    module = stirred(make_module(name))
    ours = text_accuracy(module.model, data)
    assert (ours["tokens"], ours["bytes"]) == (length + 1, length)
    ids = [EOS, *text.encode()]
    end = log_probabilities(module.model, ids if length < L else ids[-1:], [EOS])
    nats = ours["loss"] * ours["tokens"] + float(end)
    (found,) = HarnessModel(module.model, ByteTokenizer(), L, 2).loglikelihood_rolling(requests((text,)), True)
    assert -found / length / math.log(2) == pytest.approx(nats / length / math.log(2), abs=1e-6)
    assert ours["bits_per_byte"] * length * math.log(2) == pytest.approx(float(-end) - found, abs=1e-4)


def test_the_last_window_of_a_text_has_a_full_context(model, harness):
    ids = list(TEXT.encode())
    assert len(ids) % L
    expected = 0.0
    for start in range(0, len(ids), L):
        part = ids[start : start + L]
        before = [EOS, *ids][: start + 1][-(L + 1 - len(part)) :]
        expected += float(log_probabilities(model, before, part).sum())
    found = harness.loglikelihood_rolling(requests((TEXT,), ("",), ("a",)), True)
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert found[1] == 0
    assert found[2] == pytest.approx(float(log_probabilities(model, [EOS], [97])), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_pairs_have_their_own_likelihood_in_every_batch(batch_size, model):
    harness = HarnessModel(model, ByteTokenizer(), L, batch_size)
    pairs = [("def add(", "a"), ("x", " = add(1, 2)"), ("", "abc"), ("a long context that is cut", " é"), ("x ", "y")]
    ids = torch.tensor([list(b"def add(")])
    greedy = model.generate(ids, 1, temperature=0)[0, -1:].tolist()
    first = [chr(greedy[0])] if greedy[0] < 128 else []
    pairs += [("def add(", text) for text in first]
    found = harness.loglikelihood(requests(*pairs), True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        blanks = context[len(context.rstrip()) :]  # the harness moves them into the continuation
        before, after = list(context.rstrip().encode()) or [EOS], list((blanks + continuation).encode())
        before = before[-(L + 1 - len(after)) :]
        each = log_probabilities(model, before, after)
        assert value == pytest.approx(float(each.sum()), abs=1e-5)
        with torch.no_grad():
            likeliest = model(torch.tensor([before + after]))[0].argmax(-1)[len(before) - 1 : -1]
        assert is_greedy == (likeliest.tolist() == after)
    with pytest.raises(ValueError, match=rf"^a continuation has 40 tokens, more than max_length={L}: set a larger "):
        harness.loglikelihood(requests(("a", "b" * 40)), True)


def test_generations_are_those_of_the_model_up_to_a_stop(model):
    harness = HarnessModel(model, ByteTokenizer(), 64, batch_size=2)
    tokenizer, options = ByteTokenizer(), {"until": [], "max_gen_toks": 20, "do_sample": False}
    contexts = ["def add(", "x = 1\n", "def sub(", "", "é", "def mul("]
    whole = []
    for context in contexts:
        prompt = list(context.encode()) or [EOS]
        ids = model.generate(torch.tensor([prompt]), 20, temperature=0)[0, len(prompt) :].tolist()
        whole.append(tokenizer.decode(ids[: ids.index(EOS)] if EOS in ids else ids))
    assert harness.generate_until(requests(*((context, options) for context in contexts)), True) == whole
    stop = next(text for text in whole if len(text) > 6)[3:5]
    asked = options | {"until": ["never there", stop]}
    stopped = harness.generate_until(requests(*((context, asked) for context in contexts)), True)
    assert stopped == [text.split(stop)[0] for text in whole]
    assert stopped != whole

    sampled = options | {"do_sample": True, "temperature": 1.0, "top_k": 20}
    found = harness.generate_until(requests(*[("def add(", sampled)] * 5), True)
    assert len(set(found)) == 5
    with pytest.raises(ValueError, match="sampled with temperature and top_k, but the task sets top_p"):
        harness.generate_until(requests(("a", sampled | {"top_p": 0.9})), True)
    with pytest.raises(ValueError, match=r"^max_length=64 leaves no room for a prompt before 64 new tokens"):
        harness.generate_until(requests(("a", options | {"max_gen_toks": 64})), True)


def test_the_end_of_text_and_all_stops_end_a_generation(model, monkeypatch):
    steps = []
    step = type(model).step
    monkeypatch.setattr(model, "step", lambda *given: steps.append(1) or step(model, *given), raising=False)
    harness = HarnessModel(model, ByteTokenizer(), 64)
    every = [chr(i) for i in range(128)] + ["\N{REPLACEMENT CHARACTER}"]
    assert harness.generate_until(requests(("a", {"until": every, "max_gen_toks": 30})), True) == [""]
    assert steps == []
    assert harness._cut([97, EOS, 98], []) == ("a", True)
    assert harness._cut([97, 98], []) == ("ab", False)


TASKS = {
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    },
    "local_generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def trained(make_data, make_module, tmp_path_factory) -> Path:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    steps = {"max_steps": 1, "limit_val_batches": 0, "use_distributed_sampler": False}
    trainer = Trainer(accelerator="cpu", **quiet, **steps)
    trainer.fit(make_module("bsbr"), datamodule=make_data())
    path = tmp_path_factory.mktemp("trained") / "trained.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_the_command_runs_local_tasks(trained, tmp_path, monkeypatch, capsys):
    """And says the numbers of plain sums."""
    monkeypatch.chdir(tmp_path)
    documents = [
        {"text": f"line {i} of {i + 1}", "choices": [" a", ", the same as 3"], "label": i % 2} for i in range(6)
    ]
    (tmp_path / "documents.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, documents))))
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "documents.jsonl"}}}
        content = {"task": name, **source, "test_split": "test", **task}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    options = [f"--tasks={','.join(TASKS)}", "--include_path=tasks", "--out=found.json", "--batch_size=4"]
    assert main(["lm-eval", str(trained), *options, "--device=cpu"]) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["max_length"] == 32

    model = LanguageModule.load(trained).model
    likelihood = partial(log_probabilities, model)
    nats = -sum(float(likelihood([EOS], list(d["text"].encode())).sum()) for d in documents)
    num_bytes = sum(len(d["text"]) for d in documents)
    expected = nats / math.log(2) / num_bytes
    assert found["results"]["local_rolling"]["bits_per_byte,none"] == pytest.approx(expected, abs=1e-6)
    assert f"{expected:.4f}" in table
    right = 0
    for d in documents:
        scores = [float(likelihood(list(d["text"].encode()), list(c.encode())).sum()) for c in d["choices"]]
        right += scores.index(max(scores)) == d["label"]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(right / 6)
    assert "local_generation" in table


def test_the_page_runs(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "howto" / "lm_eval.md").read_text()
    for folder in ("tasks", "runs/version_0/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(trained, "runs/version_0/checkpoints/best.ckpt")
    Path("texts.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (task,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    Path("tasks/my_text.yaml").write_text(task)
    (command,) = re.findall("^bsbr (.*)$", page, re.M)
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    result = json.loads(Path("results.json").read_text())["results"]["my_text"]["bits_per_byte,none"]
    assert "|my_text|" in printed
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(example, {})
    assert float(capsys.readouterr().out) == pytest.approx(result, abs=1e-6)


def test_mistakes_are_told_in_a_sentence(trained, make_trainer, tmp_path, capsys):
    data = InductionData(16, num_train=8, num_test=4, context_length=16, batch_size=4)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    trainer.fit(LanguageModule("linear", 16, hidden_dim=16, num_layers=1, num_heads=2), datamodule=data)
    trainer.save_checkpoint(tmp_path / "recall.ckpt")
    for path, words in (
        (trained, "tasks: the harness has no task 'nope'; --include_path=FOLDER adds yours"),
        (tmp_path / "recall.ckpt", "was not trained on text, so it reads no task of the harness"),
    ):
        with pytest.raises(SystemExit):
            main(["lm-eval", str(path), "--tasks=nope"])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["max_length", "batch_size"])
def test_sizes_are_positive(model, name):
    with pytest.raises(ValueError, match=f"^{name} must be a positive integer, got 0$"):
        HarnessModel(model, ByteTokenizer(), **{"max_length": 8, name: 0})


def test_the_tokenizer_has_as_many_ids_as_the_model():
    other = LanguageModule("linear", 16, hidden_dim=16, num_layers=1, num_heads=2).model
    with pytest.raises(ValueError, match=r"^tokenizer has 25\d ids, but the model has 16$"):
        HarnessModel(other, ByteTokenizer(), 8)
