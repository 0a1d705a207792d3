"""Every use of another package's private members. tests/test_patches.py fails where one of them changes.

Tested with jsonargparse 4.53.0 (`_check_type`), argparse of Python 3.11 (`_actions`), Lightning 2.6.6
(`_parse_ckpt_path`, `_run_subcommand`) and torch 2.13.0 (`torch.utils._python_dispatch`, from where torch's own
documentation imports TorchDispatchMode, and `torch._dynamo.config`, which has a public name in new versions only).
"""

import functools
from argparse import Action, ArgumentParser
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

Check = Callable[[Any], Any]


def actions_of(parser: ArgumentParser) -> dict[str, Action]:
    """The actions of a parser by destination: `model.hidden_dim`, ..."""
    return {action.dest: action for action in parser._actions}


def wrap_check(action: Any, wrapper: Callable[[Check, Any], Any]) -> None:
    """Replace an option's check by `wrapper(check, value)`, for values of the command line and of files alike.

    Args:
        action: of an option with a type, which jsonargparse checks.
        wrapper: gets the option's own check and the value as given; returns the checked value.
    """
    check = action._check_type

    @functools.wraps(check)
    def checked(value: Any, **options: Any) -> Any:
        return wrapper(functools.partial(check, **options), value)

    action._check_type = checked


def wrap_reading(wrapper: Callable[[Callable[[], str], Any], str]) -> None:
    """Make jsonargparse read every file by `wrapper(read, path)`; its own `read` has no limit."""
    from jsonargparse import Path

    read = Path.read_text
    Path.read_text = lambda path: wrapper(functools.partial(read, path), path)  # type: ignore[assignment, method-assign]


def allow_recompilations(limit: int) -> None:
    """Let torch.compile keep at least `limit` compiled forms of one function; by default it gives up after 8."""
    import torch

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)


def __getattr__(name: str) -> Any:
    """`TorchDispatchMode`, imported when it is used: the report's command line needs no torch."""
    if name != "TorchDispatchMode":
        raise AttributeError(name)
    from torch.utils import _python_dispatch

    return _python_dispatch.TorchDispatchMode


class KeepArguments:
    """Makes a LightningCLI that inherits from it keep the arguments of command line and configs.

    LightningCLI would silently replace them by those that the checkpoint of `--ckpt_path` was saved with.
    """

    def _parse_ckpt_path(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(functools.partial(super()._run_subcommand, subcommand))  # type: ignore[misc]

    def run_command(self, run: Callable[[], None]) -> None:
        """Run the subcommand."""
        run()
