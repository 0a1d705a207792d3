"""Kill training, tokenizing and evaluating at random moments, resume, and compare with an uninterrupted process.

    python tests/faults/kill_and_resume.py                       # 25 kills of each
    python tests/faults/kill_and_resume.py --kills 100 --seed 1 --what training

Training is killed (SIGKILL) at a random time between its first file and its end, every fifth time while it writes a
checkpoint. It is resumed with `--ckpt_path=last`, or started again if there is no checkpoint yet. Weights, optimiser,
schedule, order of samples and all curves (in the checkpoint, in record.json and in TensorBoard) must then be bit for
bit those of an uninterrupted run. Dropout is on, gradients are accumulated, a worker reads the data, and checkpoints
are saved at every place in an epoch.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from bsbr_pl.__main__ import main as bsbr  # noqa: E402
from bsbr_pl.data import TextData  # noqa: E402

TEXT = "\n".join(f"def add_{i}(a, b):\n    return a + b + {i * i}\n" for i in range(150))
CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_steps: 40
  val_check_interval: 14
  accumulate_grad_batches: 2
  log_every_n_steps: 1
  enable_progress_bar: false
  callbacks:
    - class_path: callbacks.StepTimer
    - {class_path: callbacks.AttentionMaps, init_args: {every_n_steps: 7}}
    - class_path: callbacks.RunRecorder
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/loss, enable_version_counter: false}
    - {class_path: callbacks.LastCheckpoint, init_args: {every_n_steps: 3}}
    - class_path: callbacks.FiniteLoss
model:
  attention: {class_path: bsbr_pl.attention.BSBRAttention, init_args: {chunk_size: 16}}
  hidden_dim: 64
  num_layers: 2
  num_heads: 2
  dropout: 0.1
data:
  class_path: bsbr_pl.data.TextData
  init_args:
    {source: text.txt, tokenizer: bytes, context_length: 64, batch_size: 4, num_workers: 1, cache_dir: cache}
"""


class SampleOrder(Callback):
    """Records the ids of all training samples in order, also in the checkpoint."""

    def __init__(self) -> None:
        self.order: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.order.append(batch["index"].tolist())

    def state_dict(self) -> dict[str, Any]:
        return {"order": [list(ids) for ids in self.order]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.order = state_dict["order"]


class CLI(train.CLI):
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, SampleOrder())
        return trainer


def fit(*options: str) -> None:
    train.CLI = CLI  # type: ignore[misc]
    train.main(["fit", "--config=config.yaml", *options])


def tokenize() -> None:
    TextData("texts", "bpe", bpe_vocab_size=1000, cache_dir="tokenized").prepare_data()


def measure() -> None:
    bsbr(["evaluate", "runs", "--multiples=[1,2]", "--lengths=[64,128]", "--rounds=2", "--device=cpu"])


def in_folder(folder: Path, job: Callable[..., None], options: Sequence[str]) -> None:
    """The main function of a process that will be killed; its output goes to a file."""
    multiprocessing.set_start_method("fork", force=True)  # for the workers of loaders, as in any other process
    os.chdir(folder)
    sys.argv = sys.argv[:1]  # Lightning warns about arguments that it is not given
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "temporary")
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    try:
        job(*options)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start(folder: Path, job: Callable[..., None], *options: str) -> Any:
    """A process that does a job, forked from a process that has only imported everything."""
    process = multiprocessing.get_context("forkserver").Process(target=in_folder, args=(folder, job, options))
    process.start()
    return process


def finish(folder: Path, job: Callable[..., None], *options: str) -> None:
    """Do a job in a process, without a kill."""
    process = start(folder, job, *options)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"exit code {process.exitcode}:\n{(folder / 'output.txt').read_text()[-3000:]}")


def half_written(folder: Path) -> list[Path]:
    """Files of a checkpoint that is being written: beside the checkpoint, or in the folder for temporary files."""
    return [*folder.glob("runs/*/checkpoints/*.tmp"), *filter(Path.is_file, folder.glob("temporary/*"))]


def wait_for(condition: Callable[[], Any], process: Any, pause: float = 0.01) -> None:
    """Wait until the condition holds or the process ends."""
    while not condition() and process.exitcode is None:
        time.sleep(pause)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """The places at which two nested values differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            if key not in one or key not in other:
                yield f"{where}/{key} is missing"
            else:
                yield from differences(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield where
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{where}/{i}")
    elif one != other:
        yield f"{where}: {str(one)[:80]} against {str(other)[:80]}"


def exact(curves: dict[str, Any]) -> dict[str, Any]:
    """The recorded metrics that no clock decides: name -> step and value."""
    parts = ("train", "val", "attention")
    return {name: (c["step"], c["value"]) for name, c in curves.items() if name.split("/")[0] in parts}


def trained(folder: Path) -> dict[str, Any]:
    """The results of a finished run in `folder` that must not depend on kills."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it prints what it drops
    (run,) = folder.glob("runs/*")
    last, best = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("last", "best"))
    record = json.loads((run / "record.json").read_text())
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    return {
        "last": {key: last[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")},
        "best": {key: best[key] for key in ("state_dict", "global_step")},
        "files": sorted(path.name for path in run.glob("checkpoints/*.ckpt")),
        "order": next(state for name, state in last["callbacks"].items() if "SampleOrder" in name),
        "loader": last["loops"]["fit_loop"]["state_dict"]["combined_loader"],
        "curves in the checkpoint": exact(last["callbacks"]["RunRecorder"]["metrics"]),
        "curves in record.json": exact(record["metrics"]),
        "curves in TensorBoard": exact(
            {name: {"step": [e.step for e in s], "value": [e.value for e in s]} for name, s in scalars.items()}
        ),
        "status": (record["status"], record["steps"]),
    }


def tokenized(folder: Path) -> dict[str, bytes]:
    """All files of the prepared text, except the times and versions in meta.json."""
    (corpus,) = [path for path in (folder / "tokenized").iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in corpus.iterdir() if path.name != "meta.json"}


def measured(folder: Path) -> dict[str, Any]:
    """The rows of results.jsonl by identity, with the values that no clock decides, and the files of the report."""
    rows = [json.loads(line) for line in (folder / "evaluation" / "results.jsonl").read_text().splitlines()]
    values = {json.dumps(row["identity"]): row["values"] for row in rows}
    if len(values) < len(rows):
        raise RuntimeError("something was measured twice")
    if not (folder / "evaluation" / "report.html").read_text().rstrip().endswith("</html>"):
        raise RuntimeError("report.html is cut short")
    kept = {key: found if '"kind": "cost"' not in key else sorted(found) for key, found in values.items()}
    return {"rows": kept, "files": sorted(p.name for p in (folder / "evaluation").glob("*/*.[cps][snv][vg]"))}


def prepare_training(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    (folder / "config.yaml").write_text(CONFIG)


def prepare_texts(folder: Path) -> None:
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(TEXT.replace("add", f"add_{i}") * 8)


#: What is killed -> how its folder is prepared, the job, its results, and the first file that it writes.
KINDS = {
    "training": (prepare_training, fit, trained, "runs/*/events*"),
    "tokenizing": (prepare_texts, tokenize, tokenized, "tokenized/.*"),
    "evaluating": (prepare_training, measure, measured, "evaluation/results.jsonl"),
}


def kill_again(what: str, kills: int, draw: random.Random, folder: Path) -> int:
    """Kill `kills` processes, each once. Returns how many gave other results than the uninterrupted process."""
    prepare, job, outcome, first_file = KINDS[what]
    origin, alone = folder / what, folder / f"{what}-alone"
    (origin / "temporary").mkdir(parents=True)
    prepare(origin)
    if what == "evaluating":
        finish(origin, fit)
    shutil.copytree(origin, alone)
    finish(alone, job)
    expected = outcome(alone)

    failed = saves = anew = number = 0
    lasts = 0.0  # seconds from its first file to its end
    while number < kills:
        place = shutil.copytree(origin, folder / f"{what}-{number}")
        process = start(place, job)
        wait_for(lambda place=place: any(place.glob(first_file)), process)
        begun = time.perf_counter()
        during_save = what == "training" and number % 5 == 0
        if lasts:
            process.join(draw.uniform(0, lasts))
            if during_save:
                wait_for(lambda place=place: half_written(place), process, pause=0)
            process.kill()
        process.join()
        left = half_written(place)
        if process.exitcode == 0 or (during_save and not left):  # too late: another try
            lasts = time.perf_counter() - begun if process.exitcode == 0 else lasts
            shutil.rmtree(place)
            continue
        saves += bool(left)
        options = ["--ckpt_path=last"] if any(place.glob("runs/*/checkpoints/last.ckpt")) else []
        if what == "training" and not options:
            anew += 1
            shutil.rmtree(place / "runs", ignore_errors=True)
        try:
            finish(place, job, *options if what == "training" else [])
            found = list(differences(expected, outcome(place)))
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        failed += bool(found)
        for line in found[:10]:
            print(f"  kill {number}: {line}", flush=True)
        shutil.rmtree(place)
        number += 1
    more = f", {saves} of them while a checkpoint was being written, {anew} before the first checkpoint"
    equal = f"{kills - failed} gave the results of an uninterrupted process"
    print(f"{what}: {kills} kills{more * (what == 'training')}; {equal}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--what", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    modules = ["train", "bsbr_pl.evals.commands", "bsbr_pl.report"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    with tempfile.TemporaryDirectory() as folder:
        draw = random.Random(options.seed)
        failed = sum(kill_again(what, options.kills, draw, Path(folder)) for what in options.what)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
