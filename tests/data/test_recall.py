"""The recall data modules: one interface, slices, and each sample once."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from bsbr_pl.data import InductionData, MQARData, NeedleData, SelectiveCopyData, TokenData


@pytest.fixture(params=["mqar", "induction", "selective_copy", "needle"])
def data(request: pytest.FixtureRequest, folder: Path, cache: str) -> TokenData:
    if request.param == "mqar":
        return MQARData(200, [(16, 2, 20), (32, 4, 10)], [(16, 2, 7), (64, 8, 5)], batch_size=4)
    if request.param == "induction":
        return InductionData(16, 32, [16, 64], 20, 7, batch_size=4)
    if request.param == "selective_copy":
        return SelectiveCopyData(16, 32, 4, 20, 7, batch_size=4)
    return NeedleData(
        str(folder), "bytes", context_length=32, depths=[0, 0.5], num_train=20, num_test=7, cache_dir=cache
    )


def test_batches_and_slices(data: TokenData) -> None:
    data.prepare_data()
    data.setup("fit")
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        seen: list[int] = []
        for batch in loader:
            assert batch.keys() == {"input_ids", "targets", "slice", "index"}
            assert all(tensor.dtype == torch.int64 for tensor in batch.values())
            assert batch["input_ids"].shape == batch["targets"].shape
            assert batch["input_ids"].min() >= 0
            assert batch["input_ids"].max() < data.vocab_size
            assert batch["targets"].max() < data.vocab_size
            assert (batch["targets"] >= 0).any(1).all()
            name = data.slice_names[batch["slice"][0]]
            assert (batch["slice"] == batch["slice"][0]).all()
            if name.startswith("T"):
                assert batch["input_ids"].shape[1] == int(name[1:].split("_")[0])
            seen += batch["index"].tolist()
        assert len(seen) == len(set(seen))
        if split == "val":
            assert seen == list(range(len(seen)))
    assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == data.batch_size


def test_every_split_has_its_own_samples_and_they_never_change(data: TokenData) -> None:
    first, again = (next(iter(data.test_dataloader()))["input_ids"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(next(iter(data.val_dataloader()))["input_ids"], first)
    other = type(data)(**{**data.hparams, "seed": 1})
    assert not torch.equal(next(iter(other.test_dataloader()))["input_ids"], first)
    assert other.fingerprint != data.fingerprint
    assert type(data)(**{**data.hparams, "batch_size": 3}).fingerprint == data.fingerprint


def test_it_can_be_sent_to_another_process(data: TokenData) -> None:
    samples = data.samples("train")
    ids = np.arange(3)
    copy = pickle.loads(pickle.dumps(samples))
    assert torch.equal(copy[ids]["input_ids"], samples[ids]["input_ids"])
    assert data.state_dict() == {"fingerprint": data.fingerprint}
    assert str(data).startswith(f"{type(data).__name__}(")


def test_training_mixes_segments_in_whole_batches() -> None:
    data = MQARData(200, [(16, 2, 22), (32, 4, 10)], batch_size=4)
    samples = data.samples("train")
    orders = [[ids.tolist() for ids in samples.train_batches(4, epoch)] for epoch in range(6)]
    assert all(len(order) == 5 + 2 and all(len(ids) == 4 for ids in order) for order in orders)
    assert all(len({i >= 22 for i in ids}) == 1 for order in orders for ids in order)
    assert len({str(order) for order in orders}) == 6
    assert len({tuple(ids[0] >= 22 for ids in order) for order in orders}) > 1
    assert data.context_length == 64
    assert data.slice_names == ["T16_N2", "T32_N4", "T64_N4"]


def test_published_settings_are_possible() -> None:
    lengths = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    data = MQARData(test_segments=[(length, pairs, 2) for length, pairs in lengths], batch_size=2)
    shapes = [tuple(batch["input_ids"].shape) for batch in data.test_dataloader()]
    assert shapes == [(2, length) for length, _ in lengths]
    assert [(batch["targets"] >= 0).sum(1).tolist() for batch in data.test_dataloader()] == [
        [n] * 2 for _, n in lengths
    ]


def test_arguments_from_numpy_leave_only_plain_ones() -> None:
    """As a checkpoint holds them, and as the fingerprint reads them."""
    data, same = InductionData(16, 8, np.array([8, 16]), np.int64(64)), InductionData(16, 8, [8, 16], 64)
    assert data.hparams == same.hparams
    assert type(data.hparams["num_train"]) is int
    assert data.fingerprint == same.fingerprint
    nested = MQARData(train_segments=[(np.int64(16), 2, 20)]).hparams["train_segments"]
    assert [type(number) for number in nested[0]] == [int, int, int]


def test_bad_input(folder: Path, cache: str) -> None:
    with pytest.raises(ValueError, match=r"segment \(T=64, N=17\)"):
        MQARData(test_segments=[(64, 17, 10)])
    with pytest.raises(ValueError, match="segment T64_N4 has 0 samples: at least 1"):
        MQARData(test_segments=[(64, 4, 0)])
    with pytest.raises(ValueError, match="segment T64_N4 has 30 training samples, fewer than one batch of 64"):
        len(MQARData(train_segments=[(64, 4, 30)]).train_dataloader())
    with pytest.raises(ValueError, match="num_copied=20"):
        next(iter(SelectiveCopyData(context_length=32, num_copied=20).train_dataloader()))
    with pytest.raises(ValueError, match="vocab_size=2"):
        next(iter(InductionData(vocab_size=2).train_dataloader()))
    needle = NeedleData(str(folder), "bytes", context_length=10**6, cache_dir=cache)
    with pytest.raises(ValueError, match="context_length=1000000 must be from 23 to"):
        next(iter(needle.train_dataloader()))


def test_a_haystack_is_cut_from_the_text_of_its_split(folder: Path, cache: str) -> None:
    one = {"num_needles": 1, "test_needles": [1], "num_train": 40, "num_test": 20}
    data = NeedleData(str(folder), "bpe", 300, 64, depths=[0, 0.3, 1], cache_dir=cache, **one)
    streams = {split: "".join(map(chr, data.text_data.corpus.tokens(split))) for split in ("train", "val", "test")}
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        found, depths = set(), set()
        for batch in loader:
            for row in batch["input_ids"].tolist():
                place = row.index(data.vocab_size - 1)
                depths.add(place)
                found.add("".join(map(chr, row[:place] + row[place + 3 : -2])))
        assert all(haystack in streams[split] for haystack in found)
        assert not any(haystack in text for name, text in streams.items() if name != split for haystack in found)
        assert len(found) > 30, "from different places"
        assert depths == {0, 18, 59} if split == "val" else len(depths) > 15


def test_needles_are_tested_at_every_length_number_and_depth(folder: Path, cache: str) -> None:
    grid = {"num_needles": 3, "value_length": 2, "test_needles": [1, 3], "test_lengths": [64, 128], "depths": [0, 0.5]}
    data = NeedleData(str(folder), "bytes", context_length=48, num_train=20, num_test=7, cache_dir=cache, **grid)
    names = [f"T{length}_N{needles}_d{depth}" for length in (64, 128) for needles in (1, 3) for depth in ("0", "0.5")]
    assert data.slice_names == ["T48_N3", *names]
    assert (data.train_lengths, data.validation_length) == ({48: 1}, 128)
    seen = {}
    for batch in data.test_dataloader():
        marks = (batch["input_ids"] == data.vocab_size - 1).sum(1).unique().tolist()
        (count,) = (batch["targets"] >= 0).sum(1).unique().tolist()
        seen[data.slice_names[batch["slice"][0]]] = (batch["input_ids"].shape[1], marks, count)
    assert seen == {name: (int(name[1:].split("_")[0]), [int(name.split("_")[1][1:]) + 1], 2) for name in names}
    assert all(((batch["targets"] >= 0).sum(1) == 6).all() for batch in data.train_dataloader())


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_questions_come_as_late_as_power_says(power: float) -> None:
    """The mean slot of one question, of those after the pair, with weights slot^(power - 1)."""
    data = MQARData(200, [(64, 1, 10)], [(64, 1, 2000)], power=power)
    slots = [(batch["targets"][:, 2::2] >= 0).float().argmax(1) + 1 for batch in data.test_dataloader()]
    weights = np.arange(1, 32) ** (power - 1)
    mean = (np.arange(1, 32) * weights).sum() / weights.sum()
    assert float(torch.cat(slots).float().mean()) == pytest.approx(mean, abs=0.8)


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = [
        np.concatenate(InductionData(16, 8, [8], 64, seed=seed).samples("train").train_batches(8, epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 9, "seed 1 is not the second epoch of seed 0"
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert all(0.25 < (np.diff(order) > 0).mean() < 0.75 for order in orders)


def test_one_sample_is_enough_to_test() -> None:
    data = MQARData(200, [(16, 2, 4)], [(16, 2, 1)], batch_size=4)
    assert [batch["index"].tolist() for batch in data.test_dataloader()] == [[0]]
    assert len(data.train_dataloader()) == 1


def test_without_samples_nothing_is_tested() -> None:
    assert MQARData(200, [(16, 2, 4)], [], batch_size=4).validation_length == 0
    assert InductionData(16, 8, [], 64).validation_length == 0
