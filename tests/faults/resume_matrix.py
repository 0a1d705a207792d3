"""Random runs, killed after a random step and resumed: bit for bit the run that was never stopped, or one sentence.

    python tests/faults/resume_matrix.py                      # 40 draws
    python tests/faults/resume_matrix.py --draws=4 --seed=1

A draw is a command line of train.py: an architecture, text or a recall task, precision, limits, epochs or steps,
accumulation, dropout, the optimiser's arguments, intervals, loggers, workers, and the step at which it ends. In this
process a kill is an error that nothing handles, right before a step: only what LastCheckpoint had saved is left. The
draws with a number divisible by 10 run in processes of their own, two by DDP, which get SIGKILL. Compared are
the weights, the optimiser, the schedule, the numbers of steps and samples, every logged loss and metric of last.ckpt,
and the samples of every batch after the kill.
"""

import argparse
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

from lightning import Callback

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.damage import quiet  # noqa: E402
from faults.kill_and_resume import TEXT, differences, exact  # noqa: E402

import train  # noqa: E402
from bsbr_pl.attention import ARCHITECTURES  # noqa: E402
from bsbr_pl.checkpoint import load_checkpoint  # noqa: E402

BOUNDED = {"num_train": 40, "num_test": 8}
DATA: dict[str, dict[str, Any]] = {
    "TextData": {"source": "text.txt", "tokenizer": "bytes", "context_length": 32, "cache_dir": "cache"},
    "MQARData": {"vocab_size": 64, "train_segments": "[[32,2,40],[32,6,40]]", "test_segments": "[[32,2,8]]"},
    "InductionData": {"context_length": 32, "test_lengths": "[16,32]", **BOUNDED},
    "SelectiveCopyData": {"context_length": 40, "num_copied": 4, **BOUNDED},
    "NeedleData": {"source": "text.txt", "tokenizer": "bytes", "context_length": 64, "cache_dir": "cache", **BOUNDED},
}
LOGGERS = ("TensorBoardLogger", "CSVLogger", "false")
KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


class KilledError(BaseException):
    """Ends a run as SIGKILL does: nothing saves a checkpoint for it."""


class Seen(Callback):
    """The samples of every batch by step; raises before step `stop`."""

    batches: ClassVar[dict[int, list[list[int]]]] = {}
    stop: ClassVar[int | None] = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.stop:
            raise KilledError
        self.batches.setdefault(trainer.global_step, []).append(batch["index"].tolist())


def draw(number: int, seed: int) -> tuple[dict[str, Any], int, int]:
    """The options of a run, after which step it is killed, and how many processes it has (0: this one)."""
    state = random.Random(f"{seed} {number}")
    processes = 0 if number % 10 else 1 + number // 10 % 2
    architecture = list(ARCHITECTURES)[number % len(ARCHITECTURES)]
    accumulate, epochs = state.choice([1, 1, 2, 3]), state.choice([0, 0, 2, 3])
    limit = state.choice([None, None, accumulate * state.randint(1, 3), *([0.3] if epochs else [])])
    overfit = accumulate * state.randint(1, 3) if limit is None and state.random() < 0.25 else 0
    steps = state.randint(6, 12)
    data = state.choice(list(DATA))
    options: dict[str, Any] = {
        "seed_everything": state.randint(0, 9),
        "model.attention": architecture,
        "model.hidden_dim": 16,
        "model.num_heads": 2,
        "model.num_layers": state.choice([1, 2]),
        "model.dropout": state.choice([0, 0.1]),
        "model.compile": "false",
        "model.learning_rate": state.choice([1e-3, 1e-2]),
        "model.min_learning_rate": state.choice([0, 0.1]),
        "model.warmup_steps": state.choice([0, 2, 5]),
        "model.weight_decay": state.choice([0, 0.1]),
        "model.beta1": state.choice([0.9, 0.8]),
        "model.beta2": state.choice([0.95, 0.99]),
        "data": data,
        **{f"data.{name}": value for name, value in DATA[data].items()},
        "data.batch_size": state.choice([4, 8]),
        "data.seed": state.randint(0, 3),
        "data.num_workers": state.choice([0, 0, 1]),
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.logger": state.choice(LOGGERS),
        "trainer.log_every_n_steps": state.choice([1, 2]),
        "trainer.precision": state.choice(["32-true", "64-true", "bf16-true", "bf16-mixed"]),
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.overfit_batches": overfit,
        "trainer.gradient_clip_val": state.choice([0, 0.3]),
        "trainer.val_check_interval": state.choice([2, 3, 50, *([1.0, 0.5] if epochs else [])]),
        "trainer.max_steps": steps,
        "trainer.max_epochs": epochs or -1,
    }
    if limit is not None:
        options["trainer.limit_train_batches"] = limit
    if not overfit and (limit_val := state.choice([None, None, 1, 2, 0.5])):
        options["trainer.limit_val_batches"] = limit_val
    every = state.choice([1, 2, 3])
    last = f"{{class_path: callbacks.LastCheckpoint, init_args: {{every_n_steps: {every}}}}}"
    options["trainer.callbacks"] = f"[callbacks.StepTimer, {last}]"
    if processes == 2:
        options |= {"trainer.devices": 2, "trainer.strategy": "ddp"}
    return options, state.randint(every, steps - 1), processes


def command(options: dict[str, Any], *more: str) -> list[str]:
    return ["fit", *(f"--{name}={value}" for name, value in options.items()), *more]


def fit(options: dict[str, Any], *more: str) -> str:
    """Train in this process; empty, or the sentence that refuses."""
    try:
        with quiet():
            train.main(command(options, *more))
    except train.USER_ERRORS as error:
        return str(error)
    except SystemExit as ended:  # the run was over before the kill
        return f"exit code {ended.code}" if ended.code else ""
    return ""


def last_of(folder: Path) -> dict[str, Any]:
    """What of a run's last checkpoint must not depend on kills; empty where there is none yet."""
    found = list(folder.glob("runs/*/checkpoints/last.ckpt"))
    if not found:
        return {}
    content = load_checkpoint(found[0])
    curves = exact(content["callbacks"]["RunRecorder"]["metrics"])
    progress = {name: content["run"][name] for name in ("step", "tokens", "samples", "validated", "planned_steps")}
    return {key: content[key] for key in KEPT} | {"curves": curves, "progress": progress}


def in_processes(folder: Path, options: dict[str, Any], *more: str, kill_after: int | None = None) -> str:
    """Train in processes of their own; with `kill_after`, SIGKILL to all of them once that step is saved."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *command(options, *more)],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        while process.poll() is None:
            time.sleep(0.05)
            if kill_after is not None and last_of(folder).get("global_step", -1) >= kill_after:
                os.killpg(process.pid, signal.SIGKILL)
                kill_after = None
        output.seek(0)
        said = output.read().strip().splitlines()
    refused = [line for line in said if line.startswith("train.py: error: ")]
    return refused[-1] if refused else "" if process.returncode in (0, -signal.SIGKILL) else "\n".join(said[-9:])


def check(number: int, seed: int, folder: Path) -> str:
    """Carry a draw out: `equal` or `refused: ...`.

    Raises:
        AssertionError: naming what differs.
    """
    options, stop, processes = draw(number, seed)
    runs = [folder / name for name in ("whole", "killed")]
    whole, killed = runs
    for run in runs:
        run.mkdir()
        (run / "text.txt").write_text(TEXT)
    Seen.batches, Seen.stop = {}, None
    if processes:
        refused = in_processes(whole, options) or in_processes(killed, options, kill_after=stop)
        expected, before = {}, last_of(killed)["global_step"] if not refused else 0
    else:
        with contextlib.chdir(whole):
            refused = fit(options)
        expected, Seen.batches, Seen.stop = Seen.batches, {}, stop
        with contextlib.chdir(killed), contextlib.suppress(KilledError):
            refused = refused or fit(options)
        before = last_of(killed).get("global_step", 0)
    if refused:
        return f"refused: {refused}"
    Seen.batches, Seen.stop = {}, None
    more = ["--ckpt_path=last"] if before else []
    with contextlib.chdir(killed):
        refused = in_processes(killed, options, *more) if processes else fit(options, *more)
    if refused:
        return f"refused: {refused}"
    found = list(differences(last_of(whole), last_of(killed)))
    assert not found, found[:5]
    assert Seen.batches == {step: ids for step, ids in expected.items() if step >= before}
    return f"equal (killed after {before} of {last_of(whole)['global_step']} steps)"


@contextlib.contextmanager
def prepared() -> Any:
    """With the callback above in every run, and quietly."""
    required, arguments = train.REQUIRED, sys.argv
    train.REQUIRED, sys.argv = (*required, Seen), ["train.py"]
    try:
        yield
    finally:
        train.REQUIRED, sys.argv = required, arguments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    failed = 0
    with prepared():
        for number in range(options.first, options.first + options.draws):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcome = check(number, options.seed, Path(folder))
                except Exception as error:
                    failed += 1
                    outcome = f"WRONG: {type(error).__name__}: {error}"
            print(f"{number}: {outcome}", flush=True)
            if "equal" not in outcome:
                print(f"    {draw(number, options.seed)}", flush=True)
    print(f"{options.draws} draws, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
