"""Train, validate or test any attention as a language model: `python train.py fit --config configs/bsbr.yaml`."""

import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import callbacks  # imported, so that YAML and command line need no more than the name of a class
from bsbr_pl.cli import CLI
from bsbr_pl.data import TokenData
from bsbr_pl.module import LanguageModule
from bsbr_pl.parsing import out_of_memory, sentence
from bsbr_pl.save_config import SaveConfig
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.utils.records import one_line

BASE_CONFIG = Path(__file__).parent / "configs" / "base.yaml"
TRUSTED = ["bsbr_pl", "callbacks", "lightning"]  # YAML and command line may name classes of these, and import no others
REQUIRED = (callbacks.RunRecorder, callbacks.FiniteLoss, callbacks.FailTogether, callbacks.LastCheckpoint)
MENDABLE = (ValueError, OSError, ImportError, MisconfigurationException)  # by a user, who gets one line to read


def main(args: ArgsType = None, run: bool = True) -> CLI:
    """Run the command line `args` (sys.argv where None)."""
    keep_freed_memory()
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=TRUSTED, instantiate_subclass_spec_in_any=False
    )
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)  # Lightning 2.6.6's own
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # batches come from memory
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")  # rotary positions
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run's
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    parsers: dict[str, Any] = {}
    for name in ("fit", "validate", "test", "predict"):
        usage = f"train.py {name} [--config=FILE ...] [--SECTION.OPTION=VALUE ...]"
        parsers[name] = {"default_config_files": [str(BASE_CONFIG)], "usage": usage}
    return CLI(
        LanguageModule,
        TokenData,
        required=REQUIRED,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        parser_kwargs=parsers,
        args=args,
        run=run,
    )


def _say_in_a_line(failed: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread could not write: it says so to the main thread too, if that goes on."""
    if isinstance(failed.exc_value, MENDABLE):
        print(f"train.py: {one_line(failed.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(failed)


def command_line(args: ArgsType = None) -> None:
    """`main`, for a user: what he can mend is told in one line, and the process exits."""
    try:
        main(args)
    except MENDABLE as error:  # anything else shows its traceback
        sys.exit(f"train.py: error: {sentence(str(error))}")
    except (RuntimeError, MemoryError) as error:
        if not (said := out_of_memory(error)):
            raise
        sys.exit(f"train.py: error: {said}")
    except callbacks.Stopped as stopped:
        say = rank_zero_only(print)
        say(
            f"train.py: stopped by {stopped}: the same command with --ckpt_path=last goes on from there",
            file=sys.stderr,
        )
        raise
    except SIGTERMException:  # outside of training; Lightning 2.6 would exit with 0
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    threading.excepthook = _say_in_a_line
    command_line()
