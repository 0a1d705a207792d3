"""Train, validate or test any attention as a language model: `python train.py fit --config configs/bsbr.yaml`."""

import glob
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

import callbacks  # imported, so that YAML and command line need no more than the name of a class
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.allocator import keep_freed_memory

BASE_CONFIG = Path(__file__).parent / "configs" / "base.yaml"


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Keep what the command line and the configs say: Lightning would let a checkpoint's arguments win unseen."""

    def instantiate_classes(self) -> None:
        """`--ckpt_path last` is the newest last.ckpt below the logger's folder; `fit` goes on in the folder of its run.

        The saved config.yaml keeps what was asked for, so that it starts a run of its own.
        """
        options = self.config.get(str(self.subcommand), self.config)
        if options.get("ckpt_path") != "last":
            super().instantiate_classes()
            return
        path = find_last(options.trainer.logger)
        arguments = options.trainer.logger.init_args
        options.ckpt_path, version = str(path), arguments.version
        if self.subcommand == "fit":
            arguments.version = path.parent.parent.name
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it is meant to
        super().instantiate_classes()
        options.ckpt_path, arguments.version = None, version


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


def main(args: ArgsType = None, run: bool = True) -> CLI:
    """Run the command line `args` (sys.argv where None)."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)  # Lightning 2.6.6's own
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # batches come from memory
    every_subcommand: dict[str, Any] = {"default_config_files": [str(BASE_CONFIG)]}
    return CLI(
        LanguageModule,
        LightningDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={name: every_subcommand for name in ("fit", "validate", "test", "predict")},
        args=args,
        run=run,
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # what a user can mend; anything else shows its traceback
        sys.exit(f"train.py: error: {error}")
    except callbacks.Stopped as stopped:
        say = rank_zero_only(print)
        say(
            f"train.py: stopped by {stopped}: the same command with --ckpt_path=last goes on from there",
            file=sys.stderr,
        )
        raise
    except SIGTERMException:  # outside of training; Lightning 2.6 would exit with 0
        sys.exit(128 + signal.SIGTERM)
