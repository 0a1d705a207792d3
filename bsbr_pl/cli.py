"""LightningCLI for language models: parses the configuration, rejects unsafe values, and resumes runs."""

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from . import run_folder as folders
from . import steps
from .attention import ARCHITECTURES
from .checkpoint import CheckedCheckpointIO, load_checkpoint
from .configuration import as_dicts, by_key, check_classes, check_values, weight_averaging
from .convert import start_from
from .limits import check_open_files, check_processes, check_trainer
from .parsing import Parser, out_of_memory
from .patches import KeepArguments, actions_of, wrap_check
from .run import LOCATIONS, Arguments, check_resumable, check_same_model, differences, of_model, run_arguments, run_of
from .utils.files import read_json
from .values import did_you_mean, one_line

LIMITS = tuple(f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict"))
BOUNDS = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time")


class TrainingParser(Parser, LightningArgumentParser):
    """LightningCLI's parser, with short answers to mistakes."""


class CLI(KeepArguments, LightningCLI):
    """`fit`, `validate`, `test` and `predict` of language models.

    Args:
        model: the LightningModule's class.
        data: the class of all data modules.
        required: callbacks that every command adds; `--without` omits one.
        options: those of LightningCLI.
    """

    def __init__(
        self,
        model: type[LightningModule],
        data: type[LightningDataModule],
        required: tuple[type[Callback], ...] = (),
        **options: Any,
    ) -> None:
        self.module_class, self.data_class = model, data
        self.required = {cls.__name__: cls for cls in required}
        self._reserved: Path | None = None  # the folder that this process made for the run
        try:
            super().__init__(model, data, parser_class=TrainingParser, **options)
        except BaseException:
            if self._reserved:
                folders.discard(self._reserved)
            raise
        if self._reserved and not any(self._reserved.iterdir()):  # fast_dev_run, or nothing was run
            folders.discard(self._reserved)

    @property
    def options(self) -> Namespace:
        """Those of the subcommand."""
        return self.config.get(str(self.subcommand), self.config)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """In the help, the options of model and data come before those of the trainer."""
        parser.add_lightning_class_args(self.module_class, "model")
        parser.add_lightning_class_args(self.data_class, "data", subclass_mode=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        words = "a checkpoint, of another architecture even, or a folder with GPT-2: its weights to start from"
        parser.add_argument("--initial_weights", type=str | None, default=None, help=words)
        words = f"callbacks to leave out, of those that every run has: {', '.join(self.required)}"
        parser.add_argument("--without", type=list[str], default=[], help=words)
        actions = actions_of(parser)
        words = "packages, separated by commas, whose classes this command line may name and run; files cannot say so"
        parser.add_argument("--trust", type=str | None, default=None, help=words)
        attention = actions["model.attention"]
        keys = ", ".join(ARCHITECTURES)
        assert isinstance(parser, TrainingParser)
        parser.short_names["model.attention"] = list(ARCHITECTURES)
        attention.help = (
            f"one of {keys}, or a class with `class_path` and `init_args`; a list for the layers; or a hybrid, "
            "'3x gated_delta_net + standard'."
        )
        wrap_check(attention, _by_key)
        for name in LIMITS:
            wrap_check(actions[f"trainer.{name}"], _whole_number)

    def before_instantiate_classes(self) -> None:
        """Refuse unknown callbacks, meaningless numbers, and values that call or write what they must not."""
        options = self.options
        if options.without is None:
            raise ValueError("without=null: give a list, or leave the option out for its default")
        if unknown := [name for name in options.without if name not in self.required]:
            raise ValueError(f"without={unknown}: only {', '.join(self.required)} can be left out by it")
        if options.seed_everything is False:
            os.environ.pop("PL_GLOBAL_SEED", None)  # set by a parent process: here nothing is seeded
        check_values(Trainer, options.trainer)
        check_trainer(options.trainer)
        folders.check_root(options.trainer)
        workers = options.data.init_args.get("num_workers")
        check_processes(devices=options.trainer.devices, num_workers=workers)
        check_open_files(workers)
        given = options.get("ckpt_path") or options.get("initial_weights")
        if self.subcommand == "fit":
            self._check_training(options)
        elif self.subcommand:
            self._check_evaluation(given, f"limit_{self.subcommand.removesuffix('idate')}_batches")
        check_classes(self.config)

    def _check_evaluation(self, given: str | None, limit: str) -> None:
        if given in (None, "best"):
            raise ValueError(
                f"{self.subcommand} needs a trained model: --ckpt_path=<file>, or `last` for the newest run's"
            )
        if self.options.trainer[limit] == 0:
            raise ValueError(f"{limit}=0 reads nothing: at least 1")
        warnings.filterwarnings("ignore", "The dirpath has changed")  # an evaluation saves no checkpoints

    def _check_training(self, options: Namespace) -> None:
        if options.get("ckpt_path") == "best":
            raise ValueError("--ckpt_path=best: give the file of a checkpoint, or `last` for the newest run's")
        for name in ("max_steps", "max_epochs", "limit_train_batches"):
            if options.trainer[name] == 0:
                raise ValueError(f"{name}=0 trains nothing: at least 1")
        if self.wanted["trainer.max_time"] == 0:
            raise ValueError(f"max_time={options.trainer.max_time} trains nothing: give a longer time")
        if 0 < options.trainer.max_steps < (options.trainer.min_steps or 0):
            raise ValueError(
                f"min_steps={options.trainer.min_steps} has no effect beside max_steps={options.trainer.max_steps}: "
                "leave it out, or give more max_steps"
            )
        if options.trainer.min_epochs and not self.wanted["trainer.has_epochs"]:
            raise ValueError(
                f"min_epochs={options.trainer.min_epochs}, and this run has no epochs: use min_steps, or set max_epochs"
            )

    @functools.cached_property
    def wanted(self) -> Arguments:
        """The arguments of the run that this command asks for, except those that are known once data is read."""
        options, data = self.options, self.options.data
        return run_arguments(
            as_dicts(options.model),
            data.class_path.rpartition(".")[2],
            as_dicts(data.get("init_args") or {}),
            as_dicts(options.trainer) | {"weight_averaging": weight_averaging(options.trainer)},
            None if isinstance(options.seed_everything, bool) else options.seed_everything,
            options.initial_weights,
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks that every run has, and the checks of checkpoints."""
        built, options = self.config_init.get(str(self.subcommand), self.config_init).trainer, self.options.trainer
        kwargs |= {name: options[name] for name in LIMITS}  # the parser makes 1.0 of 1 once more
        if isinstance(options.val_check_interval, float):  # a share of an epoch, for which Lightning needs a number
            kwargs["check_val_every_n_epoch"] = options.check_val_every_n_epoch or 1
        callbacks = _as_list(built.callbacks)
        kwargs["callbacks"] = [*callbacks, *self._missing_callbacks(callbacks)]
        kwargs["plugins"] = [*_as_list(built.plugins), CheckedCheckpointIO()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            if words := _explanation(str(error), options):
                raise ValueError(words) from error
            raise
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(trainer.default_root_dir, folders.sub_dir(options), "checkpoints"))
        if self.subcommand == "fit":
            steps.check(trainer)
        return trainer

    def _missing_callbacks(self, given: list[Callback]) -> list[Callback]:
        """The required callbacks that are missing, and one for the best checkpoint if no callback saves checkpoints."""
        without, options = self.options.without, self.options.trainer
        missing = [cls() for name, cls in self.required.items() if name not in without and not _has(given, cls)]
        if options.enable_progress_bar is False or _has(given, ProgressBar):
            missing = [callback for callback in missing if not isinstance(callback, ProgressBar)]
        if not _has(given, ModelCheckpoint) and self.options.trainer.enable_checkpointing is not False:
            missing.insert(0, ModelCheckpoint(filename="best", monitor="val/loss", enable_version_counter=False))
        return missing

    def instantiate_classes(self) -> None:
        """Choose the checkpoint and the run's folder, then construct everything.

        The saved config.yaml keeps what was asked for, so that it starts a run of its own.
        """
        options = self.options
        given, asked = options.get("ckpt_path"), options.trainer.clone()
        self._path = path = self._choose_checkpoint(given)
        folders.assign(options.trainer, self._choose_folder(given, path))
        super().instantiate_classes()
        self._resumed = given is not None
        options.trainer, options.ckpt_path = asked, None if given == "last" else given
        if options.initial_weights and not given:  # the checkpoint's weights would replace them
            left = {name.rpartition("inner.")[2] for name in start_from(self.model, options.initial_weights)}
            weights = f"The weights are those of {options.initial_weights}"
            rank_zero_info(f"{weights}; left at their start: {', '.join(sorted(left)) or 'none'}")

    def _choose_checkpoint(self, given: str | None) -> Path | None:
        """The checkpoint to load: the given one, or the newest of this command's run for `last`."""
        path = Path(given) if given else None
        if given == "last":
            wanted = self.wanted
            if self.subcommand != "fit":  # other data may be asked for
                wanted = of_model(wanted)
            path = folders.find_last(self.options.trainer, wanted)
            self.options.ckpt_path = str(path)
        if path and (checkpoint := folders.peek(path)):
            if self.subcommand == "fit":
                self._check_resume(path, checkpoint)
            else:
                check_same_model(of_model(run_of(checkpoint)["arguments"]), self.wanted)
        return path

    def _choose_folder(self, given: str | None, path: Path | None) -> Path:
        """The run's folder: that of the checkpoint for `last`, the one that a logger names, or a new one."""
        root, version = folders.root(self.options.trainer), folders.version(self.options.trainer)
        if given == "last" and path and self.subcommand == "fit" and not version:
            version = path.relative_to(root).parts[0]
        if version or self.subcommand != "fit" or getattr(rank_zero_only, "rank", 0):
            return root / (version or folders.next_version(root))
        self._reserved = folders.reserve(root)
        return self._reserved

    def run_command(self, run: Callable[[], None]) -> None:
        """Run the subcommand; say of which checkpoint an error is that occurs until its first batch is computed.

        Raises:
            ValueError: naming the checkpoint, whose content is not that of a run.
        """
        try:
            run()
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            if not getattr(self.model, "restoring", False) or out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"{self._path} cannot be restored: {reason}") from error

    @rank_zero_only
    def before_fit(self) -> None:
        if self._resumed:
            folders.set_csv_rows_aside(self.trainer)

    def _check_resume(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Refuse what cannot be resumed before a file is written; end the process if the run is finished.

        Raises:
            ValueError: naming the fixed arguments that differ, or what is wrong with the checkpoint of a finished run.
            SystemExit: with 0, after saying that the run is finished; nothing is written.
        """
        run = run_of(checkpoint)
        before = run["arguments"]
        check_resumable({name: value for name, value in before.items() if name not in LOCATIONS}, self.wanted)
        total = steps.planned(self.wanted["trainer.max_steps"], self.wanted["trainer.max_epochs"], run["epoch_steps"])
        record = read_json(path.parent.parent / "record.json")
        same_bounds = not any(argument in BOUNDS for argument, *_ in differences(before, self.wanted))
        its_end = record.get("status") == "finished" and record.get("steps") == run["step"]  # not an earlier best.ckpt
        if (total is not None and run["step"] >= total) or (its_end and same_bounds):
            load_checkpoint(path)  # raises where it is damaged
            by = record.get("ended_by", "max_steps")
            more = by if by.startswith("max_") else "max_steps"
            rank_zero_only(print)(
                f"{path.parent.parent} is finished: {run['step']:,} steps, by {by}. Nothing was changed. "
                f"For more steps, give the same command a larger --trainer.{more}"
            )
            raise SystemExit(0)


def _by_key(check: Any, value: Any) -> Any:
    config = check.keywords.get("cfg")
    return check(by_key(value, config.get("model.attention") if config else None))


def _whole_number(check: Callable[[Any], Any], value: Any) -> Any:
    """1 as an int is one batch; the parser would convert it to 1.0, which means all batches."""
    checked = check(value)
    whole = isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())
    return int(checked) if whole and isinstance(checked, float) else checked


def _explanation(error: str, options: Namespace) -> str | None:
    """A sentence that says what to do, where the message of Lightning's error does not."""
    if "enable_checkpointing=False" in error:
        return (
            "enable_checkpointing=false, and a run keeps checkpoints: leave them out with "
            "--without=[LastCheckpoint] and callbacks without ModelCheckpoint (--trainer.callbacks=[])"
        )
    if "backend" in error or "is not available" in error:
        return f"no device for accelerator={options.accelerator!r} is here: `auto` takes what there is"
    if "invalid strategy name" in error:
        known = StrategyRegistry.available_strategies()
        return f"no strategy is called {options.strategy!r}{did_you_mean(options.strategy, known)}"
    return None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _has(callbacks: list[Callback], cls: type[Callback]) -> bool:
    return any(isinstance(callback, cls) for callback in callbacks)
