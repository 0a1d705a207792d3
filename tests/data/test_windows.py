"""Windows of text: what is trained on, and that evaluation counts every token and every byte once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bsbr_pl.data import TextData
from bsbr_pl.data.base import Steps
from bsbr_pl.data.windows import Windows


def remade(data: TextData, **changes: object) -> TextData:
    return TextData(**{**data.hparams, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("context_length", [1, 7, 64, 100_000])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_token_and_byte_is_counted_once(
    text_data: TextData, tokenizer: str, context_length: int, batch_size: int
) -> None:
    data = remade(
        text_data,
        tokenizer=tokenizer,
        bpe_vocab_size=300,
        eval_context_length=context_length,
        eval_batch_size=batch_size,
    )
    stream = data.corpus.tokens("val")
    samples = data.samples("val")
    batches = samples.eval_batches(batch_size)[:: 1 if context_length > 1 else 50]
    seen = np.zeros(len(stream), int)
    for ids in batches:
        batch = samples[ids]
        assert batch["input_ids"].shape == batch["targets"].shape == (len(ids), context_length)
        for x, y, count, start in zip(
            *(batch[k].numpy() for k in ("input_ids", "targets", "num_bytes", "index")), strict=True
        ):
            n = int((y != -100).sum())
            assert (y[n:] == -100).all()
            np.testing.assert_array_equal(x[:n], stream[start : start + n])
            np.testing.assert_array_equal(y[:n], stream[start + 1 : start + 1 + n])
            assert count == len(data.tokenizer.decode_bytes(y[:n]))
            seen[start + 1 : start + 1 + n] += 1
    if context_length > 1:
        assert seen[0] == 0
        assert (seen[1:] == 1).all()


def totals(data: TextData, world_size: int = 1) -> tuple[float, int, int]:
    """Nats of a fixed rule without context, targets and bytes, over the validation split and all processes."""
    samples = data.samples("val")
    nats, tokens, size = 0.0, 0, 0
    for rank in range(world_size):
        steps = Steps(samples, samples.eval_batches(data.eval_batch_size * world_size), rank, world_size)
        for step in range(len(steps)):
            batch = steps[step]
            counted = batch["targets"] != -100
            nats += ((batch["input_ids"] * 31 + batch["targets"]) % 97)[counted].double().sum().item()
            tokens += int(counted.sum())
            size += int(batch["num_bytes"].sum())
    return nats, tokens, size


def test_bits_per_byte_do_not_depend_on_batches_windows_or_processes(text_data: TextData) -> None:
    expected = totals(text_data)
    assert expected[2] == len(text_data.text("val")) > 1000
    for context_length, batch_size, world_size in ((64, 1, 1), (63, 4, 1), (1000, 3, 2), (64, 3, 3), (50_000, 1, 4)):
        other = remade(text_data, eval_context_length=context_length, eval_batch_size=batch_size)
        assert totals(other, world_size) == expected
    bpe = remade(text_data, tokenizer="bpe", bpe_vocab_size=300)
    assert totals(bpe)[2] == expected[2]


def test_bytes_counted_do_not_depend_on_how_text_is_cut_into_files(text_data: TextData, tmp_path: Path) -> None:
    for pieces in (1, 7):
        source = tmp_path / str(pieces)
        source.mkdir()
        text = text_data.text("train").decode()
        for i in range(pieces):
            cut = slice(i * len(text) // pieces, (i + 1) * len(text) // pieces)
            (source / f"{i}.txt").write_text(text[cut], newline="")
        data = remade(text_data, source=str(source), val_fraction=0.0, test_fraction=0.0, cache_dir=str(tmp_path / "c"))
        assert data.corpus.meta["splits"]["train"]["bytes"] == len(data.text("train")) == len(text.encode())


def test_training_order_is_a_function_of_seed_and_epoch(text_data: TextData) -> None:
    samples = text_data.samples("train")
    first = samples.train_batches(8, 0)
    assert (samples.train_batches(8, 0) == first).all()
    other_seed = Windows(text_data.corpus, "train", 64, 1)
    assert not np.array_equal(other_seed.train_batches(8, 0), first)
    shifts = set()
    for epoch in range(5):
        batches = samples.train_batches(8, epoch)
        assert batches.shape == first.shape  # as many steps in every epoch
        offsets = np.sort(batches.ravel())
        assert (np.diff(offsets) % 64 == 0).all()
        assert (np.diff(offsets) > 0).all()
        assert offsets[0] >= 0
        assert offsets[-1] + 64 < samples.length
        shifts.add(offsets[0] % 64)
        assert epoch == 0 or not np.array_equal(batches, first)
        targets = samples[batches[0]]["targets"]
        assert (targets >= 0).all()
    assert len(shifts) > 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_global_batch_is_the_same_for_any_number_of_processes(text_data: TextData, world_size: int) -> None:
    samples = text_data.samples("train")
    batches = samples.train_batches(8, 3)
    shares = [Steps(samples, batches, rank, world_size) for rank in range(world_size)]
    assert {len(steps) for steps in shares} == {len(batches)}
    for step in (0, len(batches) - 1):
        together = torch.cat([steps[step]["index"] for steps in shares])
        assert together.tolist() == batches[step].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_is_divided_without_duplicates(text_data: TextData, world_size: int, batch_size: int) -> None:
    samples = text_data.samples("test")
    batches = samples.eval_batches(batch_size * world_size)
    shares = [Steps(samples, batches, rank, world_size) for rank in range(world_size)]
    rows = [steps[step] for steps in shares for step in range(len(batches))]
    ids = torch.cat([batch["index"] for batch in rows])
    assert sorted(ids[ids >= 0].tolist()) == np.concatenate(samples.eval_batches(1)).tolist()
    for batch in rows:
        blank = batch["index"] < 0
        assert not batch["num_bytes"][blank].any()
        assert (batch["targets"][blank] == -100).all()


def test_lengths_apart_for_training_and_evaluation(text_data: TextData) -> None:
    data = remade(text_data, context_length=32, eval_context_length=128)
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (8, 32)
    assert next(iter(data.val_dataloader()))["input_ids"].shape == (8, 128)
    assert next(iter(data.test_dataloader()))["input_ids"].shape[1] == 128


def test_bad_input(text_data: TextData, tmp_path: Path) -> None:
    for name in ("context_length", "batch_size", "eval_batch_size", "eval_context_length"):
        with pytest.raises(ValueError, match=f"{name}=0 is too small: at least 1"):
            remade(text_data, **{name: 0})
    for value in (2.5, True, "8"):
        with pytest.raises(ValueError, match=f"batch_size={value!r} must be an integer"):
            remade(text_data, batch_size=value)
    with pytest.raises(ValueError, match=r"context_length=90000 leaves 0 windows of the .* training tokens"):
        len(remade(text_data, context_length=90_000).train_dataloader())
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_text("x" * 100)
    data = remade(text_data, source=str(source), val_fraction=0.0, test_fraction=0.0, cache_dir=str(tmp_path / "c"))
    with pytest.raises(ValueError, match=r"the val split of source=.* is empty: give a larger val_fraction") as error:
        data.val_dataloader()
    assert str(error.value).endswith(
        "or name its val_split; or train without validation, with --trainer.limit_val_batches=0"
    )
    with pytest.raises(ValueError, match=r"test_fraction or more documents, or name its test_split$"):
        data.test_dataloader()
    # The shortest text that can be trained on: one window and its last target.
    one = remade(data, context_length=101, batch_size=1)
    assert [batch["index"].tolist() for batch in one.train_dataloader()] == [[0]]


def test_every_epoch_of_every_seed_has_an_order_of_its_own(text_data: TextData) -> None:
    found = [
        Windows(text_data.corpus, "train", 64, seed).train_batches(8, epoch).ravel()
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len({tuple(order.argsort()) for order in found}) == 9, "seed 1 is not the second epoch of seed 0"
    for order in found:
        assert 0.25 < (np.diff(order) > 0).mean() < 0.75, "not in the order of the text"
