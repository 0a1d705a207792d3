"""LightningCLI for language models: what a command line and a YAML may ask for, and how a run is gone on with."""

import copy
import functools
import glob
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .attention import ARCHITECTURES
from .checkpoint import CheckedCheckpointIO
from .convert import start_from
from .limits import check_processes, check_trainer
from .parsing import Parser

BELOW = ("name", "version", "sub_dir", "filename")  # options of loggers and callbacks that lie below another's folder


class SaveConfig(SaveConfigCallback):
    """Saves the configuration with the run, in a folder that no other process trains in.

    A folder that holds a run already must be meant to be gone on with, by a `ckpt_path`.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **options: Any) -> None:
        super().__init__(parser, config, overwrite=True, **options)
        self.goes_on = config.get("ckpt_path") is not None
        self.lock: FileLock | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":  # validate and test may be told to use a run's folder, which keeps its configuration
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if not self.goes_on and ((folder / "record.json").exists() or any(folder.glob("checkpoints/*.ckpt"))):
            raise ValueError(f"{folder} holds another run: choose another one, or give its ckpt_path to go on with it")
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(folder / ".training.lock")  # the system's own, which ends with the process
            try:
                self.lock.acquire(blocking=False)
            except Timeout as error:
                raise ValueError(f"another process trains in {folder}: start again, or choose another one") from error
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")


class TrainingParser(Parser, LightningArgumentParser):
    """LightningCLI's, with short answers to mistakes."""


class CLI(LightningCLI):
    def __init__(self, model: type[LightningModule], data: type[LightningDataModule], **options: Any) -> None:
        super().__init__(model, data, parser_class=TrainingParser, **options)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of model and data stand before the many of the trainer in the help."""
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        words = "a checkpoint, of another architecture even, or a folder with GPT-2: its weights to start from"
        parser.add_argument("--initial_weights", type=str | None, default=None, help=words)
        (attention,) = (action for action in parser._actions if action.dest == "model.attention")
        keys = ", ".join(ARCHITECTURES)
        attention.help = f"one of {keys}, or a class with `class_path` and `init_args`; or a list with one a layer."
        check = attention._check_type  # type: ignore[attr-defined]  # what every value goes through, of a file or not
        attention._check_type = functools.wraps(check)(  # type: ignore[attr-defined]
            lambda value, **more: check(by_key(value), **more)
        )

    def _parse_ckpt_path(self) -> None:
        """Keep what the command line and the configs say: Lightning would let a checkpoint's arguments win unseen."""

    def before_instantiate_classes(self) -> None:
        """Refuse to call what is no class, names that lead out of their folder, and what would look at no training."""
        options = self.config.get(str(self.subcommand), self.config)
        if self.subcommand == "fit" and options.trainer.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: at least 1")
        check_trainer(options.trainer)
        check_processes(devices=options.trainer.devices, num_workers=options.data.init_args.get("num_workers"))
        given = options.get("ckpt_path") or options.get("initial_weights")
        if self.subcommand in ("validate", "test", "predict") and given in (None, "best"):
            raise ValueError(
                f"{self.subcommand} needs a trained model: --ckpt_path=<file>, or `last` for the newest run's"
            )
        for part in _with_class_path(self.config):
            module, _, name = part["class_path"].rpartition(".")
            if not isinstance(getattr(sys.modules.get(module), name, None), type):
                raise ValueError(f"class_path {part['class_path']!r} names no class, and functions are not called")
            for key, value in (part.get("init_args") or {}).items():
                if key in BELOW and isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                    raise ValueError(f"{key}={value!r} of {name} leads out of its folder: give a name without '..'")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With checkpoints that are checked, beside whatever other plugins are asked for."""
        asked = self._get(self.config_init, "trainer")["plugins"]
        plugins = asked if isinstance(asked, list) else [asked] if asked else []
        try:
            return super().instantiate_trainer(plugins=[*plugins, CheckedCheckpointIO()], **kwargs)
        except MisconfigurationException as error:
            if "backend" not in str(error) and "is not available" not in str(error):
                raise
            wanted = self._get(self.config, "trainer").accelerator
            raise ValueError(f"no device for accelerator={wanted!r} is here: `auto` takes what there is") from error

    def instantiate_classes(self) -> None:
        """`--ckpt_path last` is the newest last.ckpt below the logger's folder; `fit` goes on in the folder of its run.

        The saved config.yaml keeps what was asked for, so that it starts a run of its own.
        """
        options = self.config.get(str(self.subcommand), self.config)
        if options.get("ckpt_path") != "last":
            super().instantiate_classes()
            if options.initial_weights and not options.get("ckpt_path"):  # whose weights would replace them
                self._start_from(options.initial_weights)
            return
        path = find_last(options.trainer.logger)
        arguments = options.trainer.logger.init_args
        options.ckpt_path, version = str(path), arguments.version
        if self.subcommand == "fit":
            arguments.version = path.parent.parent.name
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it is meant to
        super().instantiate_classes()
        options.ckpt_path, arguments.version = None, version

    def _start_from(self, path: str) -> None:
        left = {name.rpartition("inner.")[2] for name in start_from(self.model, path)}
        rank_zero_info(f"The weights are those of {path}; left at their start: {', '.join(sorted(left)) or 'none'}")


def by_key(value: Any) -> Any:
    """A choice of architectures with import paths where it has keys of `ARCHITECTURES`: `bsbr`, or a list of them."""
    if isinstance(value, str) and value in ARCHITECTURES:
        cls = ARCHITECTURES[value]
        return f"{cls.__module__}.{cls.__name__}"
    if isinstance(value, list):
        return [by_key(one) for one in value]
    if isinstance(value, dict | Namespace) and "class_path" in value:
        changed = copy.copy(value)
        changed["class_path"] = by_key(value["class_path"])
        return changed
    return value


def _with_class_path(value: Any) -> Iterator[Namespace]:
    """Everything in a configuration that is to be made by calling something."""
    if isinstance(value, Namespace):
        if "class_path" in value:
            yield value
        value = list(vars(value).values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _with_class_path(part)


def find_last(logger: Any) -> Path:
    """The newest `checkpoints/last*.ckpt` of the runs that a logger's configuration puts in its folder.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(logger, Namespace) or "save_dir" not in logger.init_args:
        raise ValueError("--ckpt_path=last looks into the save_dir of one logger: give the path of the checkpoint")
    version = logger.init_args.version
    run = "*" if version is None else glob.escape(version if isinstance(version, str) else f"version_{version}")
    folder = Path(logger.init_args.save_dir, logger.init_args.name or "")
    found = list(folder.glob(f"{run}/checkpoints/last*.ckpt"))
    if not found:
        raise ValueError(f"--ckpt_path=last: there is no {folder}/{run}/checkpoints/last.ckpt, so start without it")
    return max(found, key=lambda path: path.stat().st_mtime_ns)
