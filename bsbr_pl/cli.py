"""LightningCLI for language models: parses the configuration, rejects unsafe values, and resumes runs."""

import copy
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from . import run_folder as folders
from . import steps
from .attention import ARCHITECTURES
from .checkpoint import CheckedCheckpointIO, load_checkpoint
from .convert import start_from
from .limits import check_processes, check_trainer
from .parsing import Parser
from .run import PLACES, Arguments, check_resumable, describe_run, differences, recorded, run_of
from .run_folder import run_folder

LIMITS = tuple(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict"))
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
        folder = run_folder(trainer)
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
    """`fit`, `validate`, `test` and `predict` of language models.

    Args:
        model: the LightningModule's class.
        data: the class of all data modules.
        required: callbacks that every command has, whatever callbacks are asked for; `--without` leaves one out.
        options: those of LightningCLI.
    """

    def __init__(
        self,
        model: type[LightningModule],
        data: type[LightningDataModule],
        required: tuple[type[Callback], ...] = (),
        **options: Any,
    ) -> None:
        self.required = {cls.__name__: cls for cls in required}
        super().__init__(model, data, parser_class=TrainingParser, **options)

    @property
    def options(self) -> Namespace:
        """Those of the subcommand."""
        return self.config.get(str(self.subcommand), self.config)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of model and data stand before the many of the trainer in the help."""
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        words = "a checkpoint, of another architecture even, or a folder with GPT-2: its weights to start from"
        parser.add_argument("--initial_weights", type=str | None, default=None, help=words)
        words = f"callbacks that are left out, of those that every run has: {', '.join(self.required)}"
        parser.add_argument("--without", type=list[str], default=[], help=words)
        actions = {action.dest: action for action in parser._actions}
        attention = actions["model.attention"]
        keys = ", ".join(ARCHITECTURES)
        attention.help = f"one of {keys}, or a class with `class_path` and `init_args`; or a list with one a layer."
        _around_check(attention, lambda check, value: check(by_key(value)))
        for name in LIMITS:
            _around_check(actions[f"trainer.{name}"], _whole_number)

    def _parse_ckpt_path(self) -> None:
        """Keep what the command line and the configs say: Lightning would let a checkpoint's arguments win unseen."""

    def before_instantiate_classes(self) -> None:
        """Refuse to call what is no class, names that lead out of their folder, and what would look at no training."""
        options = self.options
        if unknown := [name for name in options.without if name not in self.required]:
            raise ValueError(f"without={unknown}: only {', '.join(self.required)} can be left out by it")
        if options.seed_everything is False:
            os.environ.pop("PL_GLOBAL_SEED", None)  # of a parent process: nothing is seeded by it here
        check_trainer(options.trainer)
        check_processes(devices=options.trainer.devices, num_workers=options.data.init_args.get("num_workers"))
        if self.subcommand == "fit":
            self._check_training(options)
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

    def _check_training(self, options: Namespace) -> None:
        for name in ("max_steps", "max_epochs", "limit_train_batches"):
            if options.trainer[name] == 0:
                raise ValueError(f"{name}=0 trains nothing: at least 1")
        if self.wanted["trainer.max_time"] == 0:
            raise ValueError(f"max_time={options.trainer.max_time} trains nothing: give a longer time")
        if options.trainer.min_epochs and not self.wanted["trainer.has_epochs"]:
            raise ValueError(
                f"min_epochs={options.trainer.min_epochs}, and this run has no epochs: use min_steps, or set max_epochs"
            )

    @functools.cached_property
    def wanted(self) -> Arguments:
        """The description of the run that this command asks for, but for what is known only once data is read."""
        options, data = self.options, self.options.data
        return describe_run(
            options.model.as_dict(),
            data.class_path.rpartition(".")[2],
            data.init_args.as_dict() if data.get("init_args") else {},
            options.trainer.as_dict(),
            None if isinstance(options.seed_everything, bool) else options.seed_everything,
            options.initial_weights,
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the callbacks that every run has, and checkpoints that are checked, beside what is asked for."""
        trainer_config = self._get(self.config_init, "trainer")
        kwargs |= {name: self.options.trainer[name] for name in LIMITS}  # the parser makes 1.0 of 1 once more
        if isinstance(self.options.trainer.val_check_interval, float):  # a share of an epoch, which Lightning asks for
            kwargs["check_val_every_n_epoch"] = self.options.trainer.check_val_every_n_epoch or 1
        asked = trainer_config["plugins"]
        plugins = asked if isinstance(asked, list) else [asked] if asked else []
        given = trainer_config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        callbacks = [*given, *self._missing_callbacks(given)]
        try:
            trainer = super().instantiate_trainer(
                plugins=[*plugins, CheckedCheckpointIO()], callbacks=callbacks, **kwargs
            )
        except MisconfigurationException as error:
            if "enable_checkpointing=False" in str(error):
                raise ValueError(
                    "enable_checkpointing=false, and a run keeps checkpoints: leave them out with "
                    "--without=[LastCheckpoint] and callbacks without ModelCheckpoint (--trainer.callbacks=[])"
                ) from error
            if "backend" not in str(error) and "is not available" not in str(error):
                raise
            wanted = self._get(self.config, "trainer").accelerator
            raise ValueError(f"no device for accelerator={wanted!r} is here: `auto` takes what there is") from error
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(trainer.default_root_dir, self._below, "checkpoints"))
        if self.subcommand == "fit":
            steps.check(trainer)
        return trainer

    def _missing_callbacks(self, given: list[Callback]) -> list[Callback]:
        """The required ones that are not there, and one that keeps the best checkpoint if none keeps any."""
        without = self.options.without
        missing = [cls() for name, cls in self.required.items() if name not in without and not _has(given, cls)]
        if not _has(given, ModelCheckpoint) and self.options.trainer.enable_checkpointing is not False:
            missing.insert(0, ModelCheckpoint(filename="best", monitor="val/loss", enable_version_counter=False))
        return missing

    def instantiate_classes(self) -> None:
        """Choose the run's folder, and its checkpoint for `--ckpt_path last`, then make everything.

        The saved config.yaml keeps what was asked for, so that it starts a run of its own.
        """
        options = self.options
        given, asked = options.get("ckpt_path"), options.trainer.clone()
        root, version = folders.root(options.trainer), folders.version(options.trainer)
        self._below = next(
            (logger.init_args.get("sub_dir") or "" for logger in folders.loggers(options.trainer)[:1]), ""
        )
        path = Path(given) if given else None
        if given == "last":
            wanted = self.wanted
            if self.subcommand != "fit":  # other data may be asked for
                wanted = {name: value for name, value in wanted.items() if name.startswith("model.")}
            path = folders.find_last(root, version, self._below, wanted)
            options.ckpt_path = str(path)
        if self.subcommand == "fit" and path and (checkpoint := folders.peek(path)):
            self._check_resume(path, checkpoint)
        if given == "last" and self.subcommand == "fit":
            version = path.relative_to(root).parts[0]  # type: ignore[union-attr]
        folders.assign(options.trainer, root / (version or folders.next_version(root)))
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it is meant to
        warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
        super().instantiate_classes()
        self._resumed = given is not None
        options.trainer, options.ckpt_path = asked, None if given == "last" else given
        if options.get("initial_weights") and not given:  # whose weights would replace them
            self._start_from(options.initial_weights)

    @rank_zero_only
    def before_fit(self) -> None:
        if self._resumed:
            folders.set_csv_rows_aside(self.trainer)

    def _check_resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Refuse what cannot be resumed before a file is written; end the process if there is no step left to take.

        Raises:
            ValueError: naming the fixed arguments that differ, or what is wrong with the checkpoint of a finished run.
            SystemExit: with 0, after saying that the run is finished; nothing is written.
        """
        before, run = recorded(checkpoint), run_of(checkpoint)
        check_resumable({name: value for name, value in before.items() if name not in PLACES}, self.wanted)
        if not run:  # of an older version
            return
        bounds = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time")
        total = steps.planned(self.wanted[bounds[0]], self.wanted[bounds[1]], run["epoch_steps"])
        record = _json(path.parent.parent / "record.json")
        as_before = not any(argument in bounds for argument, *_ in differences(before, self.wanted))
        its_end = record.get("status") == "finished" and record.get("steps") == run["step"]  # not an earlier best.ckpt
        if (total is not None and run["step"] >= total) or (its_end and as_before):
            load_checkpoint(path)  # a damaged one is no finished run
            by = record.get("ended_by", "max_steps")
            more = by if by.startswith("max_") else "max_steps"
            rank_zero_only(print)(
                f"{path.parent.parent} is finished: {run['step']:,} steps, by {by}. Nothing was changed. "
                f"For more steps, give the same command a larger --trainer.{more}"
            )
            raise SystemExit(0)

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


def _around_check(action: Any, check_value: Callable[[Callable[[Any], Any], Any], Any]) -> None:
    """Have every value of an option, of a file or not, go through `check_value(check, value)`."""
    check = action._check_type

    def checked(value: Any, **more: Any) -> Any:
        return check_value(lambda value: check(value, **more), value)

    action._check_type = functools.wraps(check)(checked)


def _whole_number(check: Callable[[Any], Any], value: Any) -> Any:
    """1 stays one batch: the parser would make 1.0 of it, which is all of them."""
    checked = check(value)
    whole = isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit())
    return int(checked) if whole and isinstance(checked, float) else checked


def _has(callbacks: list[Callback], cls: type[Callback]) -> bool:
    return any(isinstance(callback, cls) for callback in callbacks)


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
