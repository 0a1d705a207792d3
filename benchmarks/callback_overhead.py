"""What the callbacks cost: `fit` with all five against a bare PyTorch loop of the same model, data and validation.

    python benchmarks/callback_overhead.py                      # the README's configuration: all its steps, once
    python benchmarks/callback_overhead.py --config configs/gau.yaml --steps 200 --validate-every 100 --rounds 3

A round times the bare loop, `fit` without the five callbacks, and `fit` with them, in an order that changes; each from
its first batch to its last validation, with everything that is set up, logged, drawn and saved in between. Reading the
data and building the model come before. All three must end at the same validation loss. `RunSummary` is left out: it
compresses the validation text and writes a sample, once, whatever the length of the run.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import Callback, LightningDataModule

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bsbr_pl.module import LanguageModule, TokenMetrics  # noqa: E402
from bsbr_pl.utils.allocator import keep_freed_memory  # noqa: E402
from bsbr_pl.utils.records import environment  # noqa: E402
from bsbr_pl.utils.timing import summarize  # noqa: E402
from callbacks import AttentionMaps, FlopCounter, PeakMemory, RunRecorder, RunSummary, StepTimer  # noqa: E402
from train import BASE_CONFIG, CLI  # noqa: E402

LOOP, FIT, WATCHED = "bare loop", "fit", "fit with callbacks"


def bare_loop(cli: CLI) -> float:
    """Train and validate as the configuration says, without Lightning; the last validation loss."""
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


def timed(what: str, options: argparse.Namespace, folder: str) -> tuple[float, float]:
    """Seconds, and the last validation loss."""
    arguments = [
        "--config",
        str(BASE_CONFIG),
        "--config",
        options.config,
        "--trainer.logger.init_args.save_dir",
        folder,
    ]
    for name, value in (("max_steps", options.steps), ("val_check_interval", options.validate_every)):
        arguments += [f"--trainer.{name}", str(value)] if value else []
    sys.argv = sys.argv[:1]  # Lightning warns about arguments that it is not given
    settings = {"subclass_mode_data": True, "auto_configure_optimizers": False, "save_config_callback": None}
    cli = CLI(LanguageModule, LightningDataModule, seed_everything_default=0, run=False, args=arguments, **settings)
    measuring: list[Callback] = [StepTimer(), PeakMemory(), FlopCounter(), AttentionMaps(), RunRecorder()]
    others = [c for c in cli.trainer.callbacks if not isinstance(c, (RunSummary, *map(type, measuring)))]
    cli.trainer.callbacks = [*measuring, *others] if what == WATCHED else others
    cli.datamodule.prepare_data()
    start = time.perf_counter()
    if what == LOOP:
        loss = bare_loop(cli)
    else:
        cli.trainer.fit(cli.model, cli.datamodule)
        loss = float(cli.trainer.callback_metrics["val/loss"])
    return time.perf_counter() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "bsbr.yaml"), help="an architecture's YAML")
    parser.add_argument("--steps", type=int, help="optimiser steps of a run; by default those of the configuration")
    parser.add_argument("--validate-every", type=int, help="steps; by default as in the configuration")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    seconds: dict[str, list[float]] = {LOOP: [], FIT: [], WATCHED: []}
    losses: set[float] = set()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds):
            for what in [*seconds][i % 3 :] + [*seconds][: i % 3]:
                taken, loss = timed(what, options, folder)
                seconds[what].append(taken)
                losses.add(round(loss, 6))
                print(f"round {i}: {what:<20} {taken:8.2f} s   val/loss {loss:.6f}", flush=True)

    facts = environment()
    print(f"\n{Path(options.config).stem} on {facts['cpu']}, {facts['threads']} threads, torch {torch.__version__}")
    for what in (FIT, WATCHED):
        ratios = summarize([b / a for a, b in zip(seconds[LOOP], seconds[what], strict=True)])
        interval = f"   [{ratios.low:.4f}, {ratios.high:.4f}]" if options.rounds > 1 else ""
        print(f"{what} / {LOOP}: {ratios.median:.4f}{interval}")
    if len(losses) > 1:
        sys.exit(f"the runs did not do the same work: validation losses {sorted(losses)}")


if __name__ == "__main__":
    main()
