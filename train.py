"""Train, validate or test any attention as a language model: `python train.py fit --config configs/bsbr.yaml`."""

import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import Namespace, set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks  # noqa: F401 - imported, so that YAML and command line need no more than the name of a class
from bsbr_pl.checkpoint import CheckedCheckpointIO
from bsbr_pl.data import TokenData
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.records import one_line

BASE_CONFIG = Path(__file__).parent / "configs" / "base.yaml"
TRUSTED = ["bsbr_pl", "callbacks", "lightning"]  # YAML and command line may name classes of these, and import no others
MENDABLE = (ValueError, OSError, ImportError, MisconfigurationException)  # by a user, who gets one line to read
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


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            raise ValueError(f"a file given as --config is no text in UTF-8: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Keep what the command line and the configs say: Lightning would let a checkpoint's arguments win unseen."""

    def before_instantiate_classes(self) -> None:
        """Refuse to call what is no class, and names that lead out of the folder that they belong to."""
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
        return super().instantiate_trainer(plugins=[*plugins, CheckedCheckpointIO()], **kwargs)


def _with_class_path(value: Any) -> Iterator[Namespace]:
    """Everything in a configuration that is to be made by calling something."""
    if isinstance(value, Namespace):
        if "class_path" in value:
            yield value
        value = list(vars(value).values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _with_class_path(part)


def main(args: ArgsType = None, run: bool = True) -> CLI:
    """Run the command line `args` (sys.argv where None)."""
    keep_freed_memory()
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=TRUSTED, instantiate_subclass_spec_in_any=False
    )
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)  # Lightning 2.6.6's own
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # batches come from memory
    every_subcommand: dict[str, Any] = {"default_config_files": [str(BASE_CONFIG)]}
    return CLI(
        LanguageModule,
        TokenData,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        parser_kwargs={name: every_subcommand for name in ("fit", "validate", "test", "predict")},
        args=args,
        run=run,
    )


def _say_in_a_line(failed: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread could not write: it says so to the main thread too, if that goes on."""
    if isinstance(failed.exc_value, MENDABLE):
        print(f"train.py: {one_line(failed.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(failed)


if __name__ == "__main__":
    threading.excepthook = _say_in_a_line
    try:
        main()
    except MENDABLE as error:  # anything else shows its traceback
        sys.exit(f"train.py: error: {one_line(error, 1000)}")
