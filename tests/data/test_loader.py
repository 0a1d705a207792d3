"""The loader under a real Trainer: resuming anywhere gives the weights of the run that was never stopped."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from faults import environment
from lightning.pytorch.callbacks import ModelCheckpoint

from bsbr_pl.data import MQARData, TextData, TokenData
from bsbr_pl.data.base import Loader, Stream

pytestmark = [
    # Saving where another run has saved is the point here.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # A deprecation within Lightning itself.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Bigrams(pl.LightningModule):
    """The smallest language model: next-token logits from the token alone. It keeps the ids of what it saw."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(vocab_size, vocab_size, _weight=torch.zeros(vocab_size, vocab_size))
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(tuple(batch["index"].tolist()))
        return torch.nn.functional.cross_entropy(
            self.logits(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten()
        )

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.log("val", self.logits(batch["input_ids"]).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.1)


def fit(data: TokenData, folder: Path, steps: int, resume: str | None = None, **options: Any) -> Bigrams:
    model = Bigrams(data.vocab_size)
    trainer = pl.Trainer(
        **{
            "max_epochs": -1,
            "max_steps": steps,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "limit_val_batches": 1,
            "callbacks": [ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
            **options,
        }
    )
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return model


def make(kind: str, text_data: TextData, num_workers: int = 0) -> TokenData:
    if kind == "text":
        return TextData(**{**text_data.hparams, "num_workers": num_workers})
    return MQARData(40, [(16, 2, 40), (12, 1, 24)], [(16, 2, 8)], batch_size=8, seed=5, num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["text", "mqar"])
def test_resumed_anywhere_equals_uninterrupted(
    kind: str, num_workers: int, text_data: TextData, tmp_path: Path
) -> None:
    length = len(make(kind, text_data).train_dataloader())
    steps = 2 * length + 3
    whole = fit(make(kind, text_data, num_workers), tmp_path, steps)
    assert len(whole.seen) == len(set(whole.seen)) == steps
    # In the middle, one before and at the end of an epoch, and one after it.
    for stop in (2, length - 1, length, length + 1) if num_workers == 0 else (length + 2,):
        torch.manual_seed(stop)  # the global random state must not matter
        resumed = fit(make(kind, text_data, num_workers), tmp_path / "b", steps, str(tmp_path / f"step={stop}.ckpt"))
        assert resumed.seen == whole.seen[stop:]
        assert torch.equal(resumed.logits.weight, whole.logits.weight)


@pytest.mark.parametrize(
    ("save_on_train_epoch_end", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"limit_val_batches": 0}),
        (False, {"limit_train_batches": 2}),
        (True, {"limit_train_batches": 2}),
    ],
)
def test_resumed_from_an_epochs_end_checkpoint(
    save_on_train_epoch_end: bool, options: dict[str, Any], text_data: TextData, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=save_on_train_epoch_end)
    options = {"max_epochs": 99, **options}  # Lightning 2.6 counts one epoch too many after such a checkpoint
    whole = fit(make("mqar", text_data), tmp_path, 19, callbacks=[saving], **options)
    saved = {int(path.stem.split("=")[1]): path for path in tmp_path.glob("*.ckpt")}
    assert len(saved) >= 2
    for step, path in saved.items():
        resumed = fit(make("mqar", text_data), tmp_path / "b", 19, str(path), **options)
        assert resumed.seen == whole.seen[step:]
        assert torch.equal(resumed.logits.weight, whole.logits.weight)


def test_the_stream_is_the_planned_order(text_data: TextData, tmp_path: Path) -> None:
    samples = text_data.samples("train")
    plan = [tuple(ids.tolist()) for epoch in range(2) for ids in samples.train_batches(8, epoch)]
    steps = len(plan) // 2 + 3
    assert fit(make("text", text_data), tmp_path, steps).seen == plan[:steps]
    # Cut into short epochs, it is still the same stream.
    assert fit(make("text", text_data), tmp_path / "b", steps, limit_train_batches=50).seen == plan[:steps]


def test_overfitting_sees_the_same_batches_again(text_data: TextData, tmp_path: Path) -> None:
    model = fit(make("text", text_data), tmp_path, 6, overfit_batches=2, limit_val_batches=0)
    assert model.seen == model.seen[:2] * 3


def test_a_checkpoint_tells_what_data_it_saw(text_data: TextData, tmp_path: Path) -> None:
    fit(make("text", text_data), tmp_path, 1)
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert checkpoint["TextData"] == text_data.state_dict()
    assert TextData.load_from_checkpoint(tmp_path / "step=1.ckpt").fingerprint == text_data.fingerprint
    other = TextData(**{**text_data.hparams, "test_fraction": 0.11})
    with pytest.warns(UserWarning, match="the checkpoint was trained on other data"):
        other.load_state_dict(checkpoint["TextData"])


def loaders(text_data: TextData) -> Iterator[Loader]:
    for num_workers in (0, 2):
        data = make("text", text_data, num_workers)
        yield from (data.train_dataloader(), data.val_dataloader())


def test_nothing_draws_from_the_global_random_state(text_data: TextData) -> None:
    state = torch.random.get_rng_state()
    for loader in loaders(text_data):
        for _ in islice(loader, 3):
            pass
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_from_its_place_without_an_end(text_data: TextData, num_workers: int) -> None:
    samples, taken = text_data.samples("train"), 0
    plan = [ids.tolist() for number in range(3) for ids in samples.train_batches(8, number)]
    length = len(plan) // 3
    stream = Stream(samples, lambda number: samples.train_batches(8, number), num_workers, lambda: taken, False)
    with pytest.raises(TypeError, match="no length"):
        len(stream)
    for taken in (0, 5, length - 1, length, length + 2):
        seen = [batch["index"].tolist() for batch in islice(stream, length + 1)]
        assert seen == plan[taken : taken + length + 1]


def test_without_a_trainer_the_data_is_read_once(text_data: TextData) -> None:
    plan = [ids.tolist() for ids in text_data.samples("train").train_batches(8, 0)]
    assert [batch["index"].tolist() for batch in text_data.train_dataloader()] == plan


def test_a_batch_must_divide_over_the_processes(text_data: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsbr_pl.data.base.process", lambda: (0, 3))
    with pytest.raises(ValueError, match="batch_size=8 must be a multiple of the 3 processes"):
        text_data.train_dataloader()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_starts_anew_each_time(text_data: TextData, num_workers: int) -> None:
    loader = make("text", text_data, num_workers).val_dataloader()
    next(iter(loader))
    indices = [batch["index"].tolist() for batch in loader]
    assert indices == [ids.tolist() for ids in text_data.samples("val").eval_batches(8)]


def share(rank: int, folder: str, hparams: dict[str, Any]) -> None:
    """What one of two real processes gets to see, written to a file."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    data = TextData(**hparams)
    seen = [
        [batch["index"].tolist() for batch in loader] for loader in (data.train_dataloader(), data.val_dataloader())
    ]
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_divide_every_batch(text_data: TextData, tmp_path: Path) -> None:
    hparams = dict(text_data.hparams)
    environment.preload("faults.environment")  # or each process would import everything
    torch.multiprocessing.start_processes(share, (str(tmp_path), hparams), nprocs=2, start_method="forkserver")
    (train, val), (other_train, other_val) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = [batch["index"].tolist() for batch in text_data.train_dataloader()]
    assert [a + b for a, b in zip(train, other_train, strict=True)] == alone
    assert len(val) == len(other_val)
    ids = [i for batch in val + other_val for i in batch if i >= 0]
    assert sorted(ids) == sorted(i for batch in text_data.val_dataloader() for i in batch["index"].tolist())
