"""Train, validate or test any attention as a language model: `python train.py fit --config configs/bsbr.yaml`."""

import logging
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import callbacks  # so that YAML and command line can name its classes without a path
from bsbr_pl.cli import CLI
from bsbr_pl.data import TokenData
from bsbr_pl.foreign import trust
from bsbr_pl.module import LanguageModule
from bsbr_pl.parsing import open_streams, out_of_memory, sentence, trusted_packages, unknown_metric
from bsbr_pl.run_folder import SaveConfig
from bsbr_pl.utils.allocator import keep_freed_memory
from bsbr_pl.values import one_line

BASE_CONFIG = Path(__file__).parent / "configs" / "base.yaml"
#: YAML and command line may import and name classes of these packages only, and of those that --trust names.
TRUSTED = ["bsbr_pl", "callbacks", "lightning"]
REQUIRED = (
    *(callbacks.RunRecorder, callbacks.FiniteLoss, callbacks.FailTogether, callbacks.LastCheckpoint),
    callbacks.ProgressLine,
)
USER_ERRORS = (ValueError, OSError, ImportError, MisconfigurationException)  # answered in one line


def main(args: ArgsType = None, run: bool = True) -> CLI:
    """Run the command line `args` (sys.argv if None)."""
    keep_freed_memory()
    trust(trusted_packages(sys.argv[1:] if args is None else list(args)))
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=TRUSTED, instantiate_subclass_spec_in_any=False
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    for part in ("lightning.fabric", "lightning.pytorch.trainer"):
        logging.getLogger(part).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)  # Lightning 2.6.6's own
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # batches come from memory
    # Metrics are sums over all processes before they are logged: there is nothing to synchronise.
    warnings.filterwarnings("ignore", r"It is recommended to use .self\.log\(.*sync_dist=True")
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")  # rotary positions
    warnings.filterwarnings("ignore", "The `srun` command is available")  # a cluster's login node
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # a resumed run's
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    parsers: dict[str, Any] = {"description": (__doc__ or "").replace("`", "")}
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


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Lightning itself informs of: advertisements, absent devices, what a run was asked for anyway."""
    own = Path(lightning.__file__).parent
    path = Path(record.pathname)
    return record.levelno > logging.INFO or own not in path.parents or own / "pytorch/callbacks" in path.parents


def _print_in_a_line(failed: threading.ExceptHookArgs) -> None:
    """Print a user error of a thread, such as TensorBoard's writer, in one line."""
    if isinstance(failed.exc_value, USER_ERRORS):
        print(f"train.py: {one_line(failed.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(failed)


def command_line(args: ArgsType = None) -> None:
    """Shell entry point: user errors are printed as one line, and the exit code is not 0."""
    open_streams()
    try:
        main(args)
    except USER_ERRORS as error:  # any other error shows its traceback
        sys.exit(f"train.py: error: {sentence(str(error))}")
    except (RuntimeError, MemoryError) as error:
        if answer := out_of_memory(error) or unknown_metric(error):
            sys.exit(f"train.py: error: {answer}")
        raise
    except callbacks.Stopped as stopped:
        advice = "the same command with --ckpt_path=last goes on from there"
        rank_zero_only(print)(f"train.py: stopped by {stopped}: {advice}", file=sys.stderr)
        raise
    except SIGTERMException:  # outside of training; Lightning 2.6 would exit with 0
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    threading.excepthook = _print_in_a_line
    command_line()
