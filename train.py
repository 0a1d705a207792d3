"""Train, validate or test any attention as a language model: `python train.py fit --config configs/bsbr.yaml`."""

import sys
import warnings
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import callbacks  # noqa: F401 - imported, so that YAML and command line need no more than the name of a class
from bsbr_pl.module import LanguageModule
from bsbr_pl.utils.allocator import keep_freed_memory

BASE_CONFIG = Path(__file__).parent / "configs" / "base.yaml"


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Keep what the command line and the configs say: Lightning would let a checkpoint's arguments win unseen."""


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
