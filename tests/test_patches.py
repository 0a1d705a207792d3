"""The private members of other packages are what bsbr_pl/patches.py takes them for, and no other file uses any."""

import ast
import functools
import inspect
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

from bsbr_pl.cli import CLI
from bsbr_pl.patches import KeepArguments, TorchDispatchMode, actions_of, allow_recompilations, wrap_check

ROOT = Path(__file__).parent.parent


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--size", type=float | int)
    parser.add_argument("--sizes", type=list[int])
    return parser


def test_actions_are_those_of_the_parser(parser):
    actions = actions_of(parser)
    assert {"config", "size", "sizes"} <= set(actions)
    actions["size"].help = "another help"
    assert "another help" in parser.format_help()


def test_a_check_is_wrapped_for_values_of_every_origin(parser, tmp_path):
    seen = []

    def doubled(check, value):
        seen.append(value)
        return 2 * check(value)

    wrap_check(actions_of(parser)["size"], doubled)
    assert parser.parse_args(["--size=3"]).size == 6
    (tmp_path / "config.yaml").write_text("size: 4\n")
    assert parser.parse_args([f"--config={tmp_path / 'config.yaml'}"]).size == 8
    assert seen[0] == "3"
    assert 4 in seen
    assert parser.parse_args(["--sizes=[1]"]).sizes == [1], "the other options keep their checks"


def test_the_wrapped_check_has_the_signature_that_was_tested(parser):
    """jsonargparse calls it with the value first and options by name."""
    parameters = list(inspect.signature(actions_of(parser)["size"]._check_type).parameters)
    assert parameters == ["value", "append", "cfg", "mode"]


def test_a_dispatch_mode_sees_every_operator_forward_and_backward():
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.ones(3, requires_grad=True)
    with Names() as names:
        (x * 2).sum().backward()
    assert names.found.count("aten.mul.Tensor") == 2, "x * 2, and its gradient"
    assert "aten.sum.default" in names.found


def test_the_limit_of_recompilations_is_raised_and_never_lowered():
    before = torch._dynamo.config.recompile_limit
    try:
        for limit, expected in ((before + 5, before + 5), (1, before + 5)):
            allow_recompilations(limit)
            assert torch._dynamo.config.recompile_limit == expected
    finally:
        torch._dynamo.config.recompile_limit = before


def test_lightning_asks_the_method_that_is_overridden_for_the_arguments_of_a_checkpoint():
    """tests/test_train.py has the effect: the command line wins over the checkpoint."""
    assert "self._parse_ckpt_path()" in inspect.getsource(LightningCLI.__init__)
    assert "hyper_parameters" in inspect.getsource(LightningCLI._parse_ckpt_path)
    assert CLI._parse_ckpt_path is KeepArguments._parse_ckpt_path
    assert "self._run_subcommand(self.subcommand)" in inspect.getsource(LightningCLI.__init__)
    assert CLI._run_subcommand is KeepArguments._run_subcommand


FILES = [*(ROOT / "bsbr_pl").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), *ROOT.glob("*.py")]
PUBLIC = ("os._exit", "Run._fields", "value._replace")  # documented, in spite of their names


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def own_names() -> set[str]:
    """Every private name that this project itself defines or assigns."""
    found = set()
    for node in (node for path in FILES for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_uses_a_private_member(path):
    own = own_names()
    for node in ast.walk(ast.parse(path.read_text())):
        if path.name == "patches.py":
            break
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            used = ast.unparse(node)
            assert used in PUBLIC or used.startswith("aten._"), used  # operators of torch go by such names
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert not any(map(private, (node.module or "").split("."))), ast.unparse(node)
