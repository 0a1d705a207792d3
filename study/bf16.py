"""Does mixed bfloat16 train as well as fp32? Every architecture, both precisions, the same weights and batches.

    python study/bf16.py                              # small models on bytes of the standard library, 200 steps
    python study/bf16.py --architectures bsbr --seeds 0 1 2 --source text.txt --steps 1000

Chunks and windows are a quarter of the context, so that retrieval is trained too. Two losses are printed for each
precision, in nats per byte: the mean of training over the last 20 steps, and that of the validation text (its
first 512 windows) at the end, predicted in the run's own precision. A loss that is not finite ends the script.
"""

import argparse
import inspect
import logging
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bsbr_pl.attention import ARCHITECTURES  # noqa: E402
from bsbr_pl.data import TextData  # noqa: E402
from bsbr_pl.module import LanguageModule  # noqa: E402

PRECISIONS = ("32-true", "bf16-mixed")
LAST = 20  # steps whose mean is a run's training loss


class Losses(Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def train(name: str, precision: str, data: TextData, steps: int, seed: int = 0) -> tuple[float, float]:
    """Losses of training and validation of a model of two layers, hidden width 32; ValueError for one not finite."""
    seed_everything(seed, verbose=False)
    optimizer = {"learning_rate": 1.5e-2, "warmup_steps": 30, "beta2": 0.99}  # as in configs/base.yaml
    known = inspect.signature(ARCHITECTURES[name]).parameters
    sizes = {option: data.context_length // 4 for option in ("chunk_size", "window_size") if option in known}
    attention = partial(ARCHITECTURES[name], **sizes)
    module = LanguageModule(attention, data.vocab_size, hidden_dim=32, num_layers=2, num_heads=2, **optimizer)
    losses = Losses()
    trainer = Trainer(
        precision=precision,
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=512 // data.eval_batch_size,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[losses],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(module, data)
    validation = float(trainer.callback_metrics["val/loss"])
    if not all(map(math.isfinite, [*losses.values, validation])):
        raise ValueError(f"{name} in {precision}: losses are {losses.values}, then {validation} in validation")
    return sum(losses.values[-LAST:]) / LAST, validation


def compare(name: str, data: TextData, steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """The training loss and the validation loss of an architecture: (fp32, bf16-mixed) each."""
    losses = [train(name, precision, data, steps, seed) for precision in PRECISIONS]
    return list(zip(*losses, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--source", default="stdlib", help="the text, as in TextData")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)  # Lightning 2.6.6's own
    data = TextData(arguments.source, "bytes", context_length=128, batch_size=8, eval_batch_size=64)
    data.prepare_data()
    print(f"torch {torch.__version__}, {arguments.steps} steps, hidden 32, 2 layers, 8 x 128 bytes, CPU")
    head = "".join(f"{stage + ' ' + what:>16}" for stage in ("train", "val") for what in ("fp32", "bf16", "difference"))
    print(f"{'architecture':15}{'seed':>5}{head}")
    for seed in arguments.seeds:
        for name in arguments.architectures:
            found = compare(name, data, arguments.steps, seed)
            row = "".join(f"{fp32:16.4f}{bf16:16.4f}{bf16 / fp32 - 1:16.2%}" for fp32, bf16 in found)
            print(f"{name:15}{seed:5}{row}", flush=True)


if __name__ == "__main__":
    main()
