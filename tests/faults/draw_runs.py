"""Random runs, stopped and resumed at random, held to a count that is made here.

    python tests/faults/draw_runs.py --draws=300 --seed=1      # some 15 minutes on two cores

A draw is a command line of train.py: sizes of batches, accumulation, steps, epochs or time, intervals, limits, loggers,
and mostly a stop (SIGINT) at a random step and a resume with one change. From the command line alone the expectation is
computed: the windows of the text that each step reads, its learning rate, the steps at which it validates, why it ends.
The loss at the end is computed anew from last.ckpt. Nothing of bsbr_pl takes part but the forward pass of the model.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from lightning import Callback

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bsbr_pl.module import LanguageModule  # noqa: E402

TEXT = "".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n\n" for i in range(120))
CONTEXT, WARMUP = 32, 3
RESUMES = ("nothing", "free", "rate", "more steps", "fixed")
CSV, TENSORBOARD = "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"
LOGGERS = {
    "tensorboard": ["--trainer.logger=TensorBoardLogger"],
    "csv": ["--trainer.logger=CSVLogger"],
    "none": ["--trainer.logger=false"],
    "both": [f"--trainer.logger=[{{class_path: {CSV}, init_args: {{save_dir: runs}}}}, {TENSORBOARD}]"],
}


@dataclass
class Draw:
    """What a command line asks for, and how its run is interrupted."""

    batch_size: int
    accumulate: int
    max_steps: int
    max_epochs: int
    max_seconds: int
    limit_train: int | None
    overfit: int
    interval: int | float
    limit_val: int | None
    eval_batch_size: int
    workers: int
    logger: str
    data_seed: int
    rate: float = 1e-2
    lowest: float = 0.0
    stop: int | None = None
    change: str = "nothing"

    def options(self) -> list[str]:
        """The command line."""
        duration = f"00:00:00:{self.max_seconds:02d}" if self.max_seconds else "null"
        chosen: dict[str, Any] = {
            "trainer.max_steps": self.max_steps,
            "trainer.max_epochs": self.max_epochs,
            "trainer.max_time": duration,
            "trainer.accumulate_grad_batches": self.accumulate,
            "trainer.val_check_interval": self.interval,
            "trainer.overfit_batches": self.overfit,
            "data.batch_size": self.batch_size,
            "data.eval_batch_size": self.eval_batch_size,
            "data.num_workers": self.workers,
            "data.seed": self.data_seed,
            "model.learning_rate": self.rate,
            "model.min_learning_rate": self.lowest,
        }
        for name, limit in (("limit_train_batches", self.limit_train), ("limit_val_batches", self.limit_val)):
            chosen |= {} if limit is None else {f"trainer.{name}": limit}
        return [*(f"--{name}={value}" for name, value in chosen.items()), *LOGGERS[self.logger]]


def draw(random_state: random.Random) -> Draw:
    """A command line whose options go together."""
    accumulate = random_state.choice([1, 1, 2, 3])
    bound = random_state.choice(["steps", "steps", "epochs", "both", "time"])
    epochs = bound in ("epochs", "both")
    limit = random_state.choice([None, None, random_state.randint(1, 7)]) if epochs else None
    if not epochs and random_state.random() < 0.2:
        limit = accumulate * random_state.randint(1, 3)
    overfit = accumulate * random_state.randint(1, 3) if limit is None and random_state.random() < 0.15 else 0
    drawn = Draw(
        batch_size=random_state.choice([4, 8, 16, 40]),
        accumulate=accumulate,
        max_steps=random_state.randint(3, 14) if bound in ("steps", "both") else -1,
        max_epochs=random_state.randint(1, 3) if epochs else -1,
        max_seconds=1 if bound == "time" else 0,
        limit_train=limit,
        overfit=overfit,
        interval=random_state.choice([1, 2, 3, 5, 50, *([1.0, 0.5] if epochs else [])]),
        limit_val=None if overfit else random_state.choice([None, None, None, 1, 2]),
        eval_batch_size=random_state.choice([2, 8]),
        workers=random_state.choice([0, 0, 0, 1]),
        logger=random_state.choice(list(LOGGERS)),
        data_seed=random_state.randint(0, 3),
        lowest=random_state.choice([0.0, 0.1]),
    )
    if bound != "time" and random_state.random() < 0.8:
        drawn.stop = random_state.randint(0, expected(drawn).steps - 1)
        drawn.change = random_state.choice(RESUMES)
    return drawn


@dataclass
class Expectation:
    """What a run must have done at its end; `steps` is None where a clock ends it."""

    steps: int
    windows: list[list[int]] = field(default_factory=list)  # of each step, the offsets of its windows in the tokens
    validated: list[int] = field(default_factory=list)  # number of steps before each validation


def token_splits() -> dict[str, np.ndarray]:
    """The splits of the text as byte tokens (256 ends a text): the last 5 % to test on, 5 % before to validate on."""
    text = TEXT.encode()
    ends = [0, round(len(text) * 0.9), round(len(text) * 0.95), len(text)]
    names = ("train", "val", "test")
    return {
        name: np.array([256, *text[start:stop], 256]) for name, start, stop in zip(names, ends, ends[1:], strict=False)
    }


def passes(drawn: Draw, tokens: np.ndarray) -> Iterator[list[list[int]]]:
    """The batches of every pass over the training text: windows that do not overlap, shuffled, cut at a new place."""
    count = len(tokens) // CONTEXT - 1
    for number in range(10_000):
        state = np.random.default_rng([drawn.data_seed, 0 if drawn.overfit else number])
        shift = state.integers(min(CONTEXT, len(tokens) - count * CONTEXT))
        offsets = (shift + CONTEXT * state.permutation(count)).tolist()
        whole = count // drawn.batch_size * drawn.batch_size
        yield [offsets[i : i + drawn.batch_size] for i in range(0, whole, drawn.batch_size)]


def expected(drawn: Draw, steps: int | None = None) -> Expectation:
    """The expectation of a run, of `steps` steps where a clock decided."""
    tokens = token_splits()["train"]
    per_pass = len(next(passes(drawn, tokens)))
    per_epoch = min(per_pass, drawn.overfit or drawn.limit_train or per_pass)
    has_epochs = drawn.max_epochs > 0 or drawn.limit_train or drawn.overfit
    epoch_steps = math.ceil(per_epoch / drawn.accumulate) if has_epochs else None
    bounds = [drawn.max_steps] if drawn.max_steps > 0 else []
    bounds += [drawn.max_epochs * epoch_steps] if drawn.max_epochs > 0 and epoch_steps else []
    planned = min(bounds, default=None)
    total = planned if planned is not None else steps or 0

    sequence = (batch for batches in passes(drawn, tokens) for batch in batches)
    if drawn.overfit:  # every epoch the same first batches
        first = next(passes(drawn, tokens))[: drawn.overfit]
        sequence = (batch for _ in range(10_000) for batch in first)
    windows: list[list[int]] = []
    left = per_epoch
    for _ in range(total):
        taken = min(drawn.accumulate, left) if epoch_steps else drawn.accumulate
        windows.append([offset for _ in range(taken) for offset in next(sequence)])
        left = (left - taken) or per_epoch

    def due(step: int) -> bool:
        if isinstance(drawn.interval, int):
            return step % drawn.interval == 0
        assert epoch_steps
        every = max(1, int(epoch_steps * drawn.interval))
        return ((step - 1) % epoch_steps + 1) % every == 0

    return Expectation(total, windows, [step for step in range(1, total + 1) if due(step) or step == total])


def rate_of(drawn: Draw, step: int, total: int | None) -> float:
    """The learning rate of a step: warm-up, then half a cosine to the run's end, or constant without one."""
    warmup = min(WARMUP, total) if total else WARMUP
    if step < warmup:
        return drawn.rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup)) if total else 0.0
    return drawn.rate * (drawn.lowest + (1 - drawn.lowest) * (1 + math.cos(math.pi * done)) / 2)


class Seen(Callback):
    """What every batch was made of, and SIGINT at the start of a step."""

    steps: ClassVar[dict[int, list[int]]] = {}
    rates: ClassVar[dict[int, float]] = {}
    stop: ClassVar[int | None] = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        Seen.steps.setdefault(step, []).extend(batch["index"].tolist())
        Seen.rates[step] = trainer.optimizers[0].param_groups[0]["lr"]
        if step == Seen.stop:
            Seen.stop = None  # a second one would end the process
            os.kill(os.getpid(), signal.SIGINT)


def fit(drawn: Draw, *more: str) -> int | str:
    """The exit code of the command, or the sentence it ends with."""
    small = {"hidden_dim": 8, "num_heads": 1, "num_layers": 1, "warmup_steps": WARMUP, "attention.chunk_size": 8}
    data = {"source": "text.txt", "tokenizer": "bytes", "context_length": CONTEXT, "cache_dir": "cache"}
    trainer = {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": "false", "callbacks": "[]"}
    sections = {"model": small, "data": data, "trainer": trainer}
    common = [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]
    config = f"--config={ROOT / 'configs/bsbr.yaml'}"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.main(["fit", config, *common, *drawn.options(), *more])
    except SystemExit as ended:
        return ended.code or 0
    except ValueError as error:
        return str(error)
    return 0


@torch.no_grad()
def validation_loss(path: Path, drawn: Draw) -> float:
    """Of the weights in a checkpoint, over the windows that are read."""
    tokens = torch.from_numpy(token_splits()["val"])
    model = LanguageModule.load(path).model
    starts = list(range(0, len(tokens) - 1, CONTEXT))
    limit = drawn.overfit or drawn.limit_val
    read = starts if limit is None else starts[: limit * drawn.eval_batch_size]
    nats, count = 0.0, 0
    for start in read:
        window = tokens[start : start + CONTEXT + 1]
        nats += float(F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
        count += len(window) - 1
    return nats / count


def check(drawn: Draw) -> None:
    """Carry a draw out in the current folder, and assert what must be so.

    Raises:
        AssertionError: saying what is not.
    """
    Path("text.txt").write_text(TEXT)
    Seen.steps.clear()
    Seen.rates.clear()
    Seen.stop, final = drawn.stop, drawn
    code = fit(drawn)
    stopped_at = 0
    if drawn.stop is not None:
        last = drawn.stop + 1 == expected(drawn).steps
        assert code == (0 if last else 130), code
        stopped_at, Seen.stop = drawn.stop + 1, None
        Seen.steps.pop(stopped_at, None)  # a batch that was fetched, and not trained on
        if last:  # the signal came in the last step: the run is over
            assert fit(drawn, "--ckpt_path=last") == 0
        else:
            final = resume(drawn)
    (folder,) = [path.parent for path in Path().rglob("record.json")]
    record = json.loads((folder / "record.json").read_text())
    steps = record["steps"]
    Seen.steps.pop(steps, None)  # where time was up between the batches of a step
    wanted = expected(final, steps)
    assert steps == wanted.steps, (steps, wanted.steps)
    assert [sorted(Seen.steps[step]) for step in range(steps)] == [sorted(windows) for windows in wanted.windows]
    for step in range(steps):
        asked = drawn if step < stopped_at else final
        known = None if asked.max_seconds and asked.max_steps < 0 and asked.max_epochs < 0 else expected(asked).steps
        rate = rate_of(asked, step, known)
        assert math.isclose(Seen.rates[step], rate, rel_tol=1e-6, abs_tol=1e-12), (step, Seen.rates[step], rate)

    assert record["status"] == "finished"
    assert record["steps"] == record["run"]["step"] == steps
    assert record["run"]["samples"] == sum(map(len, wanted.windows))
    assert record["metrics"]["train/loss"]["step"] == list(range(steps))
    assert [step + 1 for step in record["metrics"]["val/loss"]["step"]] == wanted.validated
    assert math.isclose(
        record["metrics"]["val/loss"]["value"][-1],
        validation_loss(folder / "checkpoints/last.ckpt", final),
        rel_tol=1e-4,
    )
    best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["global_step"]
    losses = record["metrics"]["val/loss"]["value"]
    assert best == wanted.validated[losses.index(min(losses))]


def resume(drawn: Draw) -> Draw:
    """Resume a stopped run with the change that was drawn; what holds from there on."""
    if drawn.change == "free":
        code = fit(replace(drawn, workers=1 - drawn.workers, eval_batch_size=drawn.eval_batch_size), "--ckpt_path=last")
        final = drawn
    elif drawn.change == "rate":
        final = replace(drawn, rate=drawn.rate / 7)
        code = fit(final, "--ckpt_path=last")
    elif drawn.change == "more steps" and drawn.max_steps > 0 and drawn.max_epochs < 0:
        final = replace(drawn, max_steps=drawn.max_steps + 4)
        code = fit(final, "--ckpt_path=last")
    else:
        final = drawn
        if drawn.change == "fixed":
            other = replace(drawn, batch_size=drawn.batch_size * 2)
            refused = fit(other, "--ckpt_path=last")
            instead = f"data.batch_size={drawn.batch_size} instead of {other.batch_size}"
            assert isinstance(refused, str), refused
            assert instead in refused, refused
        code = fit(final, "--ckpt_path=last")
    assert code == 0, code
    return final


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """With the callback above in every run, and quietly."""
    required, arguments, threads = train.REQUIRED, sys.argv, torch.get_num_threads()
    train.REQUIRED, sys.argv = (*required, Seen), ["train.py"]
    torch.set_num_threads(1)
    try:
        yield
    finally:
        train.REQUIRED, sys.argv = required, arguments
        torch.set_num_threads(threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    failed = 0
    with prepared():
        for number in range(options.draws):
            drawn = draw(random.Random(f"{options.seed} {number}"))
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                try:
                    check(drawn)
                except Exception as error:
                    failed += 1
                    line = traceback.extract_tb(error.__traceback__)[-1].line
                    print(f"{number}: {type(error).__name__}: {str(error)[:400]} in {line}\n    {drawn}", flush=True)
            if number % 20 == 19:
                print(f"{number + 1} draws, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
