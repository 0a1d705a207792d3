"""What a data module says about itself, held to the samples that it really gives."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bsbr_pl.data
from bsbr_pl.data import (
    DATA_SETS,
    InductionData,
    MQARData,
    NeedleData,
    SelectiveCopyData,
    TextData,
    TokenData,
)
from bsbr_pl.data.base import IGNORED
from bsbr_pl.data.recall import RecallData, Segment
from bsbr_pl.data.tasks import Random

FEW: dict[str, Any] = {"num_train": 24, "num_test": 9, "batch_size": 4}


@pytest.fixture
def make(folder: Path, cache: str):
    """Each data set with small sizes, and changes to its arguments."""

    def make_one(name: str, **changes: Any) -> TokenData:
        text = {"source": str(folder), "tokenizer": "bytes", "cache_dir": cache}
        arguments: dict[str, dict[str, Any]] = {
            "TextData": {**text, "context_length": 64, "eval_context_length": 48, "batch_size": 8},
            "MQARData": {
                "vocab_size": 128,
                "train_segments": [[16, 2, 24], [32, 4, 12], [16, 4, 8]],
                "test_segments": [[32, 4, 9], [64, 4, 7]],
                "batch_size": 4,
            },
            "InductionData": {"vocab_size": 16, "context_length": 24, "test_lengths": [8, 40, 16], **FEW},
            "SelectiveCopyData": {"vocab_size": 16, "context_length": 24, "num_copied": 4, **FEW},
            "NeedleData": {**text, "context_length": 32, **FEW},
            "MADData": {"task": "noisy_recall", "context_length": 24, **FEW},
            "StateTrackingData": {
                "train_lengths": [10, 12],
                "test_lengths": [12, 40],
                "num_train": 24,
                "num_test": 9,
                "batch_size": 4,
            },
        }
        return DATA_SETS[name](**{**arguments[name], **changes})

    return make_one


def test_every_data_set_is_registered() -> None:
    exported = {name for name in bsbr_pl.data.__all__ if name.endswith("Data")} - {"TokenData"}
    assert DATA_SETS.keys() == exported
    assert all(cls.__name__ == name for name, cls in DATA_SETS.items())


def test_kinds() -> None:
    assert {name: cls.kind for name, cls in DATA_SETS.items()} == {
        "TextData": "text",
        **dict.fromkeys(DATA_SETS.keys() - {"TextData"}, "recall"),
    }


@pytest.mark.parametrize(
    ("name", "train_lengths", "validation_length"),
    [
        ("TextData", {64: 1}, 48),
        ("MQARData", {16: 32, 32: 12}, 64),
        ("InductionData", {24: 1}, 40),
        ("SelectiveCopyData", {24: 1}, 24),
        ("NeedleData", {32: 1}, 32),
        ("MADData", {24: 1}, 24),
        ("StateTrackingData", {10: 8, 11: 8, 12: 8}, 40),
    ],
)
def test_lengths_are_those_of_the_samples(
    make, name: str, train_lengths: dict[int, int], validation_length: int
) -> None:
    data = make(name)
    assert not data._log_hyperparams, "Lightning refuses arguments of one name that module and data both log"
    assert data.train_lengths == train_lengths
    assert data.validation_length == validation_length
    seen: Counter[int] = Counter()
    for batch in data.train_dataloader():
        seen[batch["input_ids"].shape[1]] += len(batch["input_ids"])
    assert seen.keys() == train_lengths.keys()
    if len(seen) > 1:
        assert seen == train_lengths
    for split in ("val", "test"):
        assert max(batch["input_ids"].shape[1] for batch in data.loader(split)) == validation_length


@pytest.mark.parametrize("length", [16, 80])
@pytest.mark.parametrize("name", DATA_SETS)
def test_at_length_changes_the_test_samples(make, name: str, length: int) -> None:
    data = make(name)
    changes = data.at_length(length)
    at = make(name, **changes)
    assert {batch["input_ids"].shape[1] for batch in at.loader("test")} == {length}
    assert at.validation_length == length
    unchanged = {key: value for key, value in at.arguments.items() if key not in changes}
    assert unchanged == {key: value for key, value in data.arguments.items() if key not in changes}
    assert data.arguments == make(name).arguments, "the data itself stays as it is"


def test_at_length_keeps_pairs_and_samples_of_the_first_segment(make) -> None:
    assert make("MQARData").at_length(80) == {"test_segments": [[80, 4, 9]]}
    assert make("MQARData", test_segments=((16, 2, 8),)).at_length(32) == {"test_segments": [[32, 2, 8]]}


@pytest.mark.parametrize(
    ("name", "length", "match"),
    [
        ("TextData", 0, "eval_context_length=0 is too small"),
        ("MQARData", 12, r"segment \(T=12, N=4\).*4 N at most T"),
        ("MQARData", 33, "T must be even"),
        ("MQARData", 128, "vocab_size=128 must be above the context length T=128"),
        ("InductionData", 2, "context_length=2"),
        ("SelectiveCopyData", 7, "num_copied=4 must be from 1 to half of context_length=7"),
        ("MADData", 25, "context_length=25 must be even"),
        ("StateTrackingData", 0, "test_lengths=0 is too small"),
        ("NeedleData", 4, "context_length=4 is too small: num_needles=1 and 1 questions take 5 tokens"),
        ("NeedleData", -1, "context_length=-1 is too small"),
    ],
)
def test_impossible_lengths_are_refused_with_the_reason(make, name: str, length: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(name).at_length(length)


def test_facts_need_no_prepared_text(tmp_path: Path) -> None:
    """Neither the source nor a folder for tokens is touched."""
    arguments: dict[str, Any] = {"source": "nowhere/to/be/found", "cache_dir": str(tmp_path / "cache")}
    for data in (TextData(**arguments, context_length=24), NeedleData(**arguments, context_length=24)):
        assert data.train_lengths == {24: 1}
        assert data.validation_length == 24
        assert list(data.at_length(96).values()) in ([96], [[96]])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("cls", "arguments", "match"),
    [
        (InductionData, {"test_lengths": [64, 2]}, "context_length=2 and vocab_size=16 to be at least 3"),
        (InductionData, {"vocab_size": 2}, "vocab_size=2"),
        (SelectiveCopyData, {"num_copied": 200}, "num_copied=200 must be from 1 to half of context_length=256"),
        (MQARData, {"vocab_size": 64}, "vocab_size=64 must be above the context length T=64"),
        (NeedleData, {"depths": [0.5, 1.5]}, r"depth=1\.5 must be from 0"),
        (NeedleData, {"context_length": 4}, "context_length=4 is too small"),
        (NeedleData, {"num_test": 0}, "num_test=0 is too small: at least 1"),
        (InductionData, {"num_test": 0}, "segment T64 has 0 samples: at least 1"),
        (TextData, {"eval_context_length": 2.5}, "eval_context_length=2.5 must be an integer"),
    ],
)
def test_impossible_tasks_are_refused_when_constructed(cls: type, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cls(**arguments)


def test_chance_is_the_share_of_one_answer(make) -> None:
    for name in DATA_SETS:
        data = make(name)
        if data.kind == "text":
            assert data.chance() is None
            continue
        answers = {
            answer
            for batch in data.test_dataloader()
            for row in batch["targets"].tolist()
            for answer in row
            if answer != IGNORED
        }
        assert data.chance() == 1 / len(answers)
    # 300 samples use each of the 15 ordinary tokens as an answer.
    assert make("InductionData", num_test=100).chance() == pytest.approx(1 / 15)


@pytest.mark.parametrize("name", DATA_SETS)
def test_answers_in_context(make, name: str) -> None:
    """Each question's key stands earlier in the sample, with the answer directly behind it; or the class says no."""
    data, behind_key = make(name), []
    for batch in data.test_dataloader():
        for ids, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
            pairs = list(itertools.pairwise(ids))
            asked = [position for position, answer in enumerate(targets) if answer != IGNORED]
            behind_key += [(ids[i], targets[i]) in pairs[:i] for i in asked]
    assert data.answers_in_context == all(behind_key)


def test_content_arguments_are_covered_by_the_fingerprint(
    make, folder: Path, tmp_path: Path, text_data: TextData
) -> None:
    """The same text under another name is the same data; another tokenizer is not."""
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    for name in ("TextData", "NeedleData"):
        data = make(name)
        assert "source" in data.content_arguments
        assert make(name, source=str(moved)).fingerprint == data.fingerprint
        assert make(name, tokenizer="bpe", bpe_vocab_size=300).fingerprint != data.fingerprint
        assert data.text_data is not None
        assert data.text_data.fingerprint == make("TextData").fingerprint
    content = set(TextData.content_arguments)
    other = {"context_length", "eval_context_length", "batch_size", "eval_batch_size", "seed", "num_workers"}
    assert content | other | {"cache_dir"} == text_data.arguments.keys()
    assert not content & other
    for name in ("MQARData", "InductionData", "SelectiveCopyData", "MADData", "StateTrackingData"):
        assert make(name).content_arguments == ()
        assert make(name).text_data is None


def test_facts_without_test_samples() -> None:
    data = MQARData(64, [(16, 2, 8)], [])
    assert data.validation_length == 0
    assert data.at_length(32) == {"test_segments": [[32, 2, 8]]}
    assert InductionData(test_lengths=[]).validation_length == 0


class Parity(RecallData):
    """A task of another package: are the ones in the sample odd in number?"""

    def __init__(self, context_length: int = 12, num_train: int = 64, num_test: int = 40, batch_size: int = 8) -> None:
        super().__init__(context_length, batch_size, None, 0, 0)
        self.save_hyperparameters(logger=False)

        def task(random: Random) -> tuple[np.ndarray, np.ndarray]:
            if context_length < 8:
                raise ValueError(f"context_length={context_length} has too few samples: at least 8")
            inputs = random.integers(0, 2, context_length)
            targets = np.full_like(inputs, IGNORED)
            targets[:, -1] = inputs.sum(1) % 2
            return inputs, targets

        self._set_segments(2, [Segment("all", task, num_train)], [Segment("all", task, num_test)])


def test_a_task_of_one_length_needs_no_more_than_its_segments() -> None:
    data = Parity()
    assert (data.kind, data.answers_in_context, data.content_arguments) == ("recall", False, ())
    assert (data.train_lengths, data.validation_length, data.text_data) == ({12: 1}, 12, None)
    assert data.chance() == 1 / 2
    assert data.at_length(20) == {"context_length": 20}
    batch = next(iter(Parity(**data.at_length(20)).test_dataloader()))
    assert batch["input_ids"].shape == (8, 20)
    assert (batch["targets"][:, -1] == batch["input_ids"].sum(1) % 2).all()
    with pytest.raises(ValueError, match="context_length=7 has too few samples"):
        data.at_length(7)
    assert str(data) == "Parity(context_length=12, num_train=64, num_test=40, batch_size=8)"
