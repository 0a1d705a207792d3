"""Models of a comparison: with random weights, from checkpoints, or from a short training that is cached."""

import logging
import math
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from tqdm import tqdm

from bsbr_pl.data import InductionData, TokenData
from bsbr_pl.model import LanguageModel
from bsbr_pl.models import model_class
from bsbr_pl.module import LanguageModule
from bsbr_pl.run import differences
from bsbr_pl.run import model_arguments as arguments_of_run
from bsbr_pl.spec import AttentionSpec
from bsbr_pl.utils.code import source_code
from bsbr_pl.values import digest

from .checkpoints import open_checkpoint
from .matching import plain, reach_option, step_times
from .subject import Subject, describe_model

VERSION = 2  # changes whenever the same arguments would train other weights


def default_task(vocab_size: int = 16, seed: int = 0) -> InductionData:
    """Induction heads in 32 tokens: which token followed the trigger before? One answer a sample.

    The share of right answers after the 1200 steps that `compare_models` trains for (seed 0, two CPU threads; guessing
    gives 0.067), by `docs/research/compare.py`; chunks and windows of 16 tokens. SlidingWindow is still learning after
    1200 steps: on other machines it had 0.57 and 0.95 at 32 tokens, by other rounding.

        tokens             32      64     128     256     512    1024
        BSBR            1.000   0.515   0.298   0.199   0.121   0.111
        Linear          1.000   1.000   1.000   0.986   0.581   0.262
        DeltaNet        1.000   1.000   1.000   0.969   0.882   0.628
        SlidingWindow   0.352   0.187   0.127   0.096   0.074   0.072
        Standard        1.000   0.648   0.267   0.102   0.067   0.050
    """
    return InductionData(vocab_size, 32, (32,), batch_size=64, seed=seed)


def check_among(argument: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise a ValueError for a name that is not known, and for one name in the place of several."""
    if isinstance(given, str):
        raise ValueError(f"{argument} must be a list of names, got {given!r}")
    for name in given:
        if name not in known:
            raise ValueError(f"{argument}: {name!r} is unknown; there are {', '.join(known)}")


def model_arguments(
    models: Sequence[str] | Mapping[str, Any],
    files: Collection[str],
    sizes: Mapping[str, Any],
    reach: int,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `LanguageModel`, for models that are no files; their reach, where an option sets it, too."""
    if isinstance(models, str) or not all(isinstance(name, str) for name in models):
        raise ValueError(f"models must be a list of names, or a dict of name -> class, got {models!r}")
    check_among("model_options", options, models)
    found = {}
    for name in models:
        if name not in files:
            model = models[name] if isinstance(models, Mapping) else name
            spec = _spec(model, {})
            option = reach_option({**sizes, "attention": spec})
            chosen = {option: reach} if option and option not in spec.options else {}
            found[name] = {**sizes, "attention": _spec(model, chosen | dict(options.get(name, {})))}
    check_among("checkpoints", files, models)
    classes: dict[str, type] = {}
    for arguments in found.values():
        spec = arguments["attention"]
        if classes.setdefault(spec.key, spec.cls) is not spec.cls:
            raise ValueError(f"models: two classes are called {spec.key}, so one would be measured as the other")
    return found


def _spec(model: Any, options: Mapping[str, Any]) -> AttentionSpec:
    """The attention of a model's name, or a class, `functools.partial` or spec, with further options."""
    if isinstance(model, str):
        return AttentionSpec.of(model_class(model).factory(**options))
    spec = AttentionSpec.of(model)
    return AttentionSpec(spec.cls, {**spec.options, **options})


def from_checkpoint(name: str, path: str | Path, trusted: bool) -> Subject:
    """A trained model with its name; `trusted`: whether paths in the file are read."""
    subject = open_checkpoint(path, trusted=trusted).subject()
    return replace(subject, about=subject.about | {"checkpoint": subject.about["checkpoint"] | {"name": name}})


def untrained(name: str, arguments: Mapping[str, Any], seed: int) -> Subject:
    """A model with the random weights of a seed; the global random state is left alone."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LanguageModel(**arguments)
    weights = digest(["random weights", plain(arguments), seed])
    return Subject(model, describe_model(name, weights, arguments, model) | {"seed": seed, "step": 0})


def train_all(
    models: Mapping[str, Mapping[str, Any]],
    task: TokenData,
    steps: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    folder: Path,
) -> dict[str, Path]:
    """Train `LanguageModule(**arguments)` of each name on `task`, unless its checkpoint is in `folder`.

    A line on standard error says first what is trained, and for how long.

    Returns:
        name -> checkpoint.
    """
    described = {name: {**plain(one), "learning_rate": learning_rate} for name, one in models.items()}
    files = {name: folder / f"{_key(one, task, steps, seed, device)}.ckpt" for name, one in described.items()}
    missing = [name for name, path in files.items() if not _is_kept(path, described[name], steps)]
    if missing:
        tokens = max(task.train_lengths)
        times = step_times({name: dict(models[name]) for name in missing}, tokens, task.batch_size, 2, device)
        tqdm.write(
            f"training {', '.join(missing)}: {steps:,} steps each, of {task.batch_size} samples of {tokens} tokens of "
            f"{type(task).__name__}, on {device.type}; about {math.ceil(steps * sum(times.values()) / 60)} min. "
            f"The weights are kept in {folder}",
            file=sys.stderr,
        )
    for name in tqdm(missing, "training", disable=None):
        _train(described[name], task, steps, seed, device, files[name])
    return files


def _key(arguments: Mapping[str, Any], task: TokenData, steps: int, seed: int, device: torch.device) -> str:
    """Digest of everything that decides the weights, the code of the architecture and of the model included."""
    with torch.random.fork_rng([]):
        parts = LanguageModule(**arguments).modules()
    code = [
        source_code(part) for part in dict.fromkeys(map(type, parts)) if part.__module__.partition(".")[0] != "torch"
    ]
    data = (str(task), task.fingerprint)
    return digest([VERSION, arguments, data, steps, seed, device.type, torch.__version__, code])


def _is_kept(path: Path, arguments: Mapping[str, Any], steps: int) -> bool:
    """Whether the file is a checkpoint of this training, as its name says."""
    with suppress(ValueError):
        one = open_checkpoint(path)
        wanted, found = (arguments_of_run(of) for of in (arguments, one.module.hparams))
        return one.step == steps and not any(differences(wanted, found))
    return False


def _train(
    arguments: Mapping[str, Any], task: TokenData, steps: int, seed: int, device: torch.device, path: Path
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}-{os.getpid()}.ckpt")
    forked = [device] if device.type == "cuda" else []
    with _quiet(), torch.random.fork_rng(forked):
        torch.manual_seed(seed)
        module = LanguageModule(**arguments)
        trainer = Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=task)
        try:
            trainer.save_checkpoint(aside)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Lightning's messages about the short training."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec")
            warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
            warnings.filterwarnings("ignore", "GPU available but not")
            warnings.filterwarnings("ignore", "The `srun` command is available")
            yield
    finally:
        logger.setLevel(level)
