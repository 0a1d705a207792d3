"""The cost of the callbacks: `fit` with all five against a bare PyTorch loop of the same model, data and validation.

    python benchmarks/callback_overhead.py                      # the README's configuration, all its steps
    python benchmarks/callback_overhead.py --config configs/gau.yaml --steps 200 --validate-every 100

Three processes do the same training: the bare loop, `fit` without the five callbacks, and `fit` with them. Only one
runs at a time: each continues for a slice of two seconds in turn, in an order that changes, and its slices are
summed, so that a slow phase of the machine slows all three. The result is the time from the first batch to the
end of the training, with everything that is set up, validated, logged, drawn and saved in between; reading the data
and building the model come before. All three must end at the same validation loss. `RunSummary` is excluded: it
compresses the validation text and writes a sample, once, whatever the length of the run.
"""

import argparse
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

import torch
import torch.nn.functional as F
from common import ROOT, parser, publish
from lightning import Callback, LightningDataModule

from bsbr_pl.metrics import TokenMetrics
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.allocator import keep_freed_memory
from callbacks import AttentionMaps, FlopCounter, PeakMemory, RunRecorder, RunSummary, StepTimer
from train import BASE_CONFIG, CLI

LOOP, FIT, WATCHED = "bare loop", "fit", "fit with callbacks"


def bare_loop(cli: CLI) -> float:
    """Train and validate as configured, without Lightning; the last validation loss."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    module.trainer = trainer  # configure_optimizers asks for the number of steps; nothing else is used
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    model = module.model.to(trainer.strategy.root_device).train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # in the order that fit sums norms in
    device = trainer.strategy.root_device
    steps, loss = 0, float("nan")
    training, validation = data.train_dataloader(), data.val_dataloader()
    while steps < trainer.max_steps:
        for batch in training:
            logits = model(batch["input_ids"].to(device))
            error = F.cross_entropy(logits.flatten(0, 1), batch["targets"].to(device).flatten(), ignore_index=-100)
            optimizer.zero_grad()
            error.backward()
            torch.nn.utils.clip_grad_norm_(parameters, trainer.gradient_clip_val)
            optimizer.step()
            scheduler.step()
            steps += 1
            if steps % trainer.val_check_interval == 0:
                loss = validate(model, validation, device)
            if steps == trainer.max_steps:
                break
    return loss


def validate(model: torch.nn.Module, batches: object, device: torch.device) -> float:
    metrics = TokenMetrics().to(device)
    model.eval()
    with torch.inference_mode():
        for batch in batches:  # type: ignore[attr-defined]
            ids, targets, num_bytes = (batch[key].to(device) for key in ("input_ids", "targets", "num_bytes"))
            metrics.update(model(ids), targets, num_bytes)
    model.train()
    return float(metrics.compute()["loss"])


def train(what: str, options: argparse.Namespace, folder: str) -> None:
    """One of the three, in its own process; it stops when it is ready, and prints its last validation loss."""
    keep_freed_memory()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    arguments = ["--config", str(BASE_CONFIG), "--config", options.config]
    arguments += ["--trainer.logger.init_args.save_dir", folder]
    for name, value in (("max_steps", options.steps), ("val_check_interval", options.validate_every)):
        arguments += [f"--trainer.{name}", str(value)] if value else []
    sys.argv = sys.argv[:1]  # Lightning warns about arguments that it is not given
    settings = {"subclass_mode_data": True, "auto_configure_optimizers": False, "save_config_callback": None}
    cli = CLI(LanguageModule, LightningDataModule, seed_everything_default=0, run=False, args=arguments, **settings)
    measuring: list[Callback] = [StepTimer(), PeakMemory(), FlopCounter(), AttentionMaps(), RunRecorder()]
    others = [c for c in cli.trainer.callbacks if not isinstance(c, (RunSummary, *map(type, measuring)))]
    cli.trainer.callbacks = [*measuring, *others] if what == WATCHED else others
    cli.datamodule.prepare_data()
    os.kill(os.getpid(), signal.SIGSTOP)
    if what == LOOP:
        loss = bare_loop(cli)
    else:
        cli.trainer.fit(cli.model, cli.datamodule)
        loss = float(cli.trainer.callback_metrics["val/loss"])
    print(f"\n{loss:.6f}", flush=True)


def take_turns(processes: dict[str, subprocess.Popen], slice_seconds: float) -> dict[str, float]:
    """Continue one stopped process at a time until all have ended. Returns the seconds of each."""
    given, order, shuffle = dict.fromkeys(processes, 0.0), list(processes), random.Random(0).shuffle
    while order:
        shuffle(order)
        for name in list(order):
            start = time.perf_counter()
            processes[name].send_signal(signal.SIGCONT)
            try:
                processes[name].wait(slice_seconds)
                order.remove(name)
            except subprocess.TimeoutExpired:
                processes[name].send_signal(signal.SIGSTOP)
            given[name] += time.perf_counter() - start
    return given


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--config", default=str(ROOT / "configs" / "bsbr.yaml"), help="an architecture's YAML")
    options.add_argument("--steps", type=int, help="optimiser steps of a run; by default those of the configuration")
    options.add_argument("--validate-every", type=int, help="steps; by default as in the configuration")
    options.add_argument("--slice", type=float, default=2.0, help="seconds of a turn")
    for hidden in ("--only", "--folder"):  # what a process of one of the three is started with
        options.add_argument(hidden, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.only:
        return train(chosen.only, chosen, chosen.folder)

    rows = []
    for _ in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as folder:
            processes = {}
            for what in (LOOP, FIT, WATCHED):
                command = [sys.executable, *sys.argv, "--only", what, "--folder", str(Path(folder) / what)]
                with open(Path(folder) / f"{what}.log", "w") as log:
                    processes[what] = subprocess.Popen(command, stdout=log, stderr=log)  # a pipe would fill and block
                os.waitid(os.P_PID, processes[what].pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # ready, or failed
            seconds = take_turns(processes, chosen.slice)
            losses = {}
            for what, process in processes.items():
                output = (Path(folder) / f"{what}.log").read_text()
                if process.returncode:
                    sys.exit(f"{what} failed:\n{output[-2000:]}")
                losses[what] = output.split()[-1]
        if len({*losses.values()}) > 1:
            sys.exit(f"the runs did not do the same work: validation losses {losses}")
        rows += [
            {
                "run": what,
                "seconds": seconds[what],
                f"over {LOOP}": seconds[what] / seconds[LOOP],
                "val/loss": losses[what],
            }
            for what in seconds
        ]
    publish(rows, chosen.out)


if __name__ == "__main__":
    main()
