"""Trainings that come out the same on one process and on two; test_processes.py runs them alone and under torchrun."""

import inspect
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

import train
from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import InductionData, TextData, TokenData
from bsbr_pl.module import LanguageModule

GLOBAL_BATCH, STEPS, SAVED = 4, 5, 2
STRATEGIES = ("ddp", "fsdp2")
#: `mixed` has a layer of every architecture.
RUNS = ("bsbr", "linear", "mixed", "recall")
RESUMED = ("bsbr",)
ON_TWO = [(before, after) for before, after in itertools.product(("auto", *STRATEGIES), STRATEGIES) if before != after]


class Losses(Logger):
    """Keeps the loss of every step, as it is logged."""

    name, version = "losses", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.found += [float(metrics["train/loss"])] if "train/loss" in metrics else []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def data_of(name: str, folder: Path) -> TokenData:
    batches = {"batch_size": GLOBAL_BATCH, "eval_batch_size": GLOBAL_BATCH}
    if name == "recall":
        return InductionData(16, 24, [16, 24], num_train=40, num_test=7, **batches)
    text = {"context_length": 32, "cache_dir": str(folder / "cache"), "val_fraction": 0.1}
    return TextData(str(folder / "texts"), "bytes", **text, **batches)


def small_options(key: str) -> dict[str, int]:
    """Chunks and windows of 8 tokens."""
    return dict.fromkeys({"chunk_size", "window_size"} & inspect.signature(ARCHITECTURES[key]).parameters.keys(), 8)


def fit(name: str, folder: Path, strategy: str, processes: int, resume: str = "") -> dict[str, Any]:
    """Train for STEPS steps in float64, or the rest of them after `resume`; what was logged, and validated at the end.

    The checkpoint of step SAVED is NAME-STRATEGY-step=SAVED.ckpt.
    """
    torch.manual_seed(0)
    data, losses = data_of(name, folder), Losses()
    layers = {"mixed": list(ARCHITECTURES), "recall": ["standard"] * 2}.get(name, [name] * 2)
    attention = [partial(ARCHITECTURES[key], **small_options(key)) for key in layers]
    sizes = {"hidden_dim": 16, "num_layers": len(layers), "num_heads": 2}
    module = LanguageModule(attention, data.vocab_size, **sizes, warmup_steps=2)
    module.double()  # what a checkpoint holds is read before the Trainer converts the module
    saving = ModelCheckpoint(
        folder / ("resumed" if resume else "."), f"{name}-{strategy}-{{step}}", every_n_train_steps=SAVED, save_top_k=-1
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        precision="64-true",
        max_epochs=-1,
        max_steps=STEPS,
        val_check_interval=STEPS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=0.3,
        accumulate_grad_batches=2 if name == "recall" else 1,
        use_distributed_sampler=False,
        logger=losses,
        log_every_n_steps=1,
        callbacks=[saving],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, ckpt_path=resume or None, weights_only=True if resume else None)
    return {"losses": losses.found, **{key: float(value) for key, value in trainer.callback_metrics.items()}}


def checkpoint(name: str, strategy: str, folder: Path) -> str:
    return str(folder / f"{name}-{strategy}-step={SAVED}.ckpt")


def main(folder: Path, arguments: list[str]) -> None:
    """What one of two processes does; at the end the command line `arguments` of train.py."""
    found = {f"{name} {strategy}": fit(name, folder, strategy, 2) for name in RUNS for strategy in STRATEGIES}
    for name, (before, after) in itertools.product(RESUMED, ON_TWO):
        found[f"{name} {before} {after}"] = fit(name, folder, after, 2, checkpoint(name, before, folder))
    if torch.distributed.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(found))
    train.main(arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
