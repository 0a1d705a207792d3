"""What each room may import and touch, as checks of source code; tests/test_layers.py applies them.

A rule reads one file's syntax tree and yields the nodes that break it. Every rule has broken and sound examples.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Find = Callable[[ast.Module], Iterator[ast.AST]]

FILES = {"io", "json", "os", "pathlib", "pickle", "shutil", "tempfile"}  # modules that read or write files
LOGGING = {"logging", "warnings"}
CLOCKS = {"time", "datetime", "timeit"}
COUNTERS = {"psutil", "resource", "tracemalloc"}
DRAWING = {"matplotlib", "seaborn", "plotly"}
RANDOM_TENSORS = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "normal"}
SEEDED = {"default_rng", "Generator", "SeedSequence", "Philox", "PCG64"}
TRAINING_CALLS = {"backward", "zero_grad", "clip_grad_norm_", "clip_gradients", "requires_grad_"}


def dotted(node: ast.AST) -> str:
    """`torch.cuda.memory_allocated` of the expression that reads it; "" for anything else than names and dots."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(the last part of what is called or all of its dotted name, the call)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            last = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            yield dotted(node.func) or last, node


def targets(tree: ast.Module) -> Iterator[ast.Attribute]:
    """The attributes that a file assigns: `x.y = ...`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node


def imported(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """(module, node) of every absolute import, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def importing(*packages: str) -> Find:
    """Imports of these packages or modules."""

    def find(tree: ast.Module) -> Iterator[ast.AST]:
        for name, node in imported(tree):
            if any(f"{name}.".startswith(f"{package}.") for package in packages):
                yield node

    return find


def calling(*names: str) -> Find:
    """Calls of these functions, or of methods of these names."""

    def find(tree: ast.Module) -> Iterator[ast.AST]:
        for name, node in calls(tree):
            if name in names or name.rpartition(".")[2] in names:
                yield node

    return find


def any_of(*finds: Find) -> Find:
    def find(tree: ast.Module) -> Iterator[ast.AST]:
        for one in finds:
            yield from one(tree)

    return find


def keyword_arguments(tree: ast.Module) -> Iterator[ast.AST]:
    """`**kwargs` in the signature of a method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.arguments) and inner.kwarg:
                    yield inner.kwarg


def device_names(tree: ast.Module) -> Iterator[ast.AST]:
    """ "cuda:0", x.cuda(), x.is_cuda."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", str(node.value)):
            yield node
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "cpu", "mps", "is_cuda"):
            yield node


def named(*words: str) -> Find:
    """Names, arguments and attributes of these words."""

    def find(tree: ast.Module) -> Iterator[ast.AST]:
        for node in ast.walk(tree):
            names = (getattr(node, "id", None), getattr(node, "arg", None), getattr(node, "attr", None))
            if any(name in words for name in names):
                yield node

    return find


def global_random_state(tree: ast.Module) -> Iterator[ast.AST]:
    """Seeding or drawing without a generator of one's own: random, np.random, torch."""
    module = any(name == "random" for name, _ in imported(tree))  # else a generator may have this name
    for name, node in calls(tree):
        package, _, function = name.rpartition(".")
        own = any(keyword.arg == "generator" for keyword in node.keywords)
        seeds = name in ("torch.manual_seed", "torch.seed", "seed_everything") or function == "seed_everything"
        numpy = package in ("np.random", "numpy.random") and function not in SEEDED
        tensors = package == "torch" and function in RANDOM_TENSORS and not own
        if seeds or numpy or tensors or (module and package == "random" and function != "Random"):
            yield node


def private_members(tree: ast.Module) -> Iterator[ast.AST]:
    """`x._y` of anything but self, cls and classes of the same file.

    Public in spite of their names: os._exit, torch's operators, the methods of named tuples.
    """
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)]
    own = {node.attr for node in attributes if dotted(node.value) in ("self", "cls")}
    own |= {"_replace", "_asdict", "_fields", "_make"}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in attributes:
        if node.attr not in own and dotted(node) != "os._exit" and not dotted(node).startswith("aten."):
            yield node


def private_names(tree: ast.Module) -> Iterator[ast.AST]:
    """getattr(x, "_y"), and imports of private modules and names of other packages."""
    for name, node in calls(tree):
        if name in ("getattr", "setattr", "hasattr") and len(node.args) > 1:
            given = node.args[1]
            if isinstance(given, ast.Constant) and re.match(r"_[^_]", str(given.value)):
                yield node
    for name, node in imported(tree):
        if any(re.match(r"_[^_]", part) for part in name.split(".")):
            yield node


def changed_callbacks(tree: ast.Module) -> Iterator[ast.AST]:
    """`trainer.callbacks`, and assignments to an attribute of another callback."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "callbacks"
            and dotted(node).split(".")[-2:-1] == ["trainer"]
        ):
            yield node
    for target in targets(tree):
        if dotted(target.value).split(".")[-1].endswith("callback"):
            yield target


def changed_training(tree: ast.Module) -> Iterator[ast.AST]:
    """Changes of gradients and parameters: calls and assignments."""
    yield from calling(*TRAINING_CALLS)(tree)
    for name, node in calls(tree):
        if name.rpartition(".")[0].endswith("optimizer") and name.endswith(".step"):
            yield node
    for target in targets(tree):
        if target.attr in ("grad", "data", "requires_grad"):
            yield target


def of_class(*names: str) -> Find:
    """Imports and uses of these classes."""

    def find(tree: ast.Module) -> Iterator[ast.AST]:
        for node in ast.walk(tree):
            found = {getattr(node, "id", None), getattr(node, "attr", None)}
            if isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names}
            if found & set(names):
                yield node

    return find


def spelled(*names: str) -> Find:
    """Strings that are one of these names."""

    def find(tree: ast.Module) -> Iterator[ast.AST]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in names:
                yield node

    return find


def sizes_by_name(tree: ast.Module) -> Iterator[ast.AST]:
    """getattr(attention, "chunk_size"), attention.window_size: sizes that only some architectures have."""
    options = ("chunk_size", "window_size", "retrieval_top_k", "router_dim")
    for name, node in calls(tree):
        if name in ("getattr", "hasattr") and any(
            getattr(argument, "value", None) in options for argument in node.args
        ):
            yield node
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in options:
            yield node


@dataclass(frozen=True)
class Rule:
    """What rooms may not do.

    Args:
        rooms: names of modules or packages that the rule holds for.
        but: modules and packages in these rooms for which it does not hold.
        find: yields what breaks the rule.
        broken: sources that break it.
        sound: sources that keep it.
    """

    rooms: tuple[str, ...]
    find: Find
    broken: tuple[str, ...]
    sound: tuple[str, ...]
    but: tuple[str, ...] = ()

    def holds_for(self, module: str) -> bool:
        return within(module, *self.rooms) and not within(module, *self.but)


def within(module: str, *rooms: str) -> bool:
    return any(f"{module}.".startswith(f"{room}.") for room in rooms)


ATTENTIONS = ("bsbr_pl.attention",)
KERNELS = (
    "bsbr_pl.attention.kernels",
    "bsbr_pl.attention.chunk_kernels",
    "bsbr_pl.attention.chunk_ops",
    "bsbr_pl.attention.triton_chunks",
    "bsbr_pl.attention.flash_chunks",
    "bsbr_pl.attention.triton_delta_rule",
    "bsbr_pl.attention.triton_recurrence",
    "bsbr_pl.attention.ops",
)
PRODUCT = ("bsbr_pl", "callbacks", "train", "evaluate")
MODEL = ("bsbr_pl.model", "bsbr_pl.branches", "bsbr_pl.generation", "bsbr_pl.inputs")
MODULE = ("bsbr_pl.module", "bsbr_pl.resume", "bsbr_pl.steps", "bsbr_pl.optimizer")


def rules(attention_classes: tuple[str, ...], data_classes: tuple[str, ...], keys: tuple[str, ...]) -> dict[str, Rule]:
    """Name -> rule.

    Args:
        attention_classes, data_classes: names of the classes in the registries.
        keys: keys of the registries, and names of models.
    """
    one = attention_classes[0]
    task = data_classes[0]
    return {
        "attention: no files": Rule(
            ATTENTIONS,
            any_of(importing(*FILES), calling("open", "read_text", "write_text", "torch.save", "torch.load")),
            (
                "import json",
                "from pathlib import Path",
                "open('x')",
                "def f(path):\n    path.read_text()",
                "torch.load(x)",
            ),
            ("import torch\nfrom .base import Attention", "x.loaded(1)"),
        ),
        "attention: no logging": Rule(
            ATTENTIONS,
            any_of(importing(*LOGGING), calling("print")),
            ("import logging", "import warnings", "def f():\n    print('slow form')"),
            ("import math", "x.print_options"),
        ),
        "attention: no device by name": Rule(
            ATTENTIONS,
            device_names,
            ("torch.zeros(3, device='cuda')", "x.to('cuda:0')", "x.cuda()", "if x.is_cuda: pass", "x.cpu()"),
            ("torch.zeros(3, device=x.device)", "'the cpu form'"),
            but=KERNELS,
        ),
        "attention: no **kwargs": Rule(
            ATTENTIONS,
            keyword_arguments,
            ("class A:\n    def f(x, **kwargs): pass", "class A:\n    def __init__(self, dim, **options): pass"),
            ("class A:\n    def f(x, *shape): pass", "class A:\n    x = f(**options)"),
        ),
        "attention: torch alone": Rule(
            ATTENTIONS,
            lambda tree: (
                node
                for name, node in imported(tree)
                if name.split(".")[0] not in {"torch", "__future__", *sys.stdlib_module_names}
            ),
            ("import numpy as np", "from lightning import Trainer", "import omegaconf"),
            (
                "import torch.nn.functional as F",
                "from torch import Tensor",
                "from .base import Attention",
                "import math",
            ),
            but=KERNELS,
        ),
        "model, utils: no print": Rule(
            (*MODEL, "bsbr_pl.utils"),
            calling("print"),
            ("print(1)", "def f():\n    print('x', file=stream)"),
            ("x.fingerprint()", "return_value = 'print'"),
        ),
        "model, utils: no trainer": Rule(
            (*MODEL, "bsbr_pl.utils", "bsbr_pl.attention"),
            any_of(named("trainer", "Trainer"), importing("lightning.pytorch.trainer")),
            ("def f(trainer): pass", "self.trainer.global_step", "from lightning import Trainer\nTrainer()"),
            ("def f(model): pass", "'the trainer'"),
        ),
        "model, utils: without Lightning": Rule(
            (*MODEL, "bsbr_pl.utils", "bsbr_pl.attention", "bsbr_pl.spec"),
            importing("lightning", "pytorch_lightning", "jsonargparse"),
            ("import lightning", "def f():\n    from lightning.pytorch.utilities import rank_zero_info"),
            ("from importlib.metadata import version\nversion('lightning')", "import torch"),
        ),
        "data: no global random state": Rule(
            ("bsbr_pl.data",),
            global_random_state,
            (
                *(
                    "import random\nrandom.shuffle(x)",
                    "import random\nrandom.seed(0)",
                    "np.random.seed(0)",
                    "np.random.permutation(3)",
                ),
                *("torch.manual_seed(0)", "torch.randperm(3)", "torch.randint(3, (2,))", "seed_everything(1)"),
            ),
            (
                *(
                    "np.random.default_rng(0).permutation(3)",
                    "import random\nrandom.Random(0).shuffle(x)",
                    "random = np.random.default_rng(0)\nrandom.permutation(3)",
                ),
                *("torch.randperm(3, generator=own)", "torch.Generator().manual_seed(0)"),
            ),
        ),
        "module: no clocks": Rule(
            MODULE,
            importing(*CLOCKS),
            ("import time", "from time import perf_counter", "def f():\n    import datetime"),
            ("import timeless", "x.time"),
        ),
        "module: no memory counters": Rule(
            MODULE,
            any_of(
                importing(*COUNTERS),
                calling(
                    "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "memory_stats", "getrusage"
                ),
            ),
            ("import resource", "torch.cuda.max_memory_allocated()", "psutil = __import__\nimport psutil"),
            ("x.memory", "import torch"),
        ),
        "module: no plots": Rule(
            MODULE,
            any_of(importing(*DRAWING), calling("add_image", "add_figure")),
            ("import matplotlib.pyplot as plt", "self.logger.experiment.add_image('x', y)"),
            ("self.log('x', y)",),
        ),
        "callbacks: no private members": Rule(
            ("callbacks",),
            any_of(private_members, private_names),
            (
                *("trainer.fit_loop._data_fetcher", "self.trainer._results", "getattr(trainer, '_x')"),
                *("def f(trainer):\n    trainer.strategy._model = 1", "from lightning.pytorch._x import y"),
            ),
            (
                "self._seen = 1",
                "trainer.fit_loop.epoch_loop",
                "cls._known",
                "super().__init__()",
                "os._exit(1)",
                "x._replace(y=1)",
            ),
        ),
        "callbacks: no other callbacks": Rule(
            ("callbacks",),
            changed_callbacks,
            ("trainer.callbacks", "for callback in x:\n    callback.every = 1", "self.trainer.callbacks.append(1)"),
            ("self.every = 1", "trainer.checkpoint_callback.best_model_path", "self.callbacks"),
        ),
        "callbacks: no gradients, parameters, random state": Rule(
            ("callbacks",),
            any_of(changed_training, global_random_state),
            (
                *("loss.backward()", "parameter.grad = None", "parameter.data = x", "trainer.optimizer.step()"),
                *("torch.manual_seed(0)", "clip_grad_norm_(x, 1)", "torch.nn.utils.clip_grad_norm_(x, 1)"),
            ),
            ("parameter.grad.norm()", "sum(p.numel() for p in module.parameters())", "clock.step()"),
        ),
        "evals: no drawing": Rule(
            ("bsbr_pl.evals",),
            importing(*DRAWING),
            ("import matplotlib.pyplot as plt", "def f():\n    from matplotlib.figure import Figure"),
            ("from bsbr_pl.utils.visualization import draw_maps",),
        ),
        "evals: training in one file": Rule(
            ("bsbr_pl.evals",),
            importing("lightning"),
            ("from lightning import Trainer", "def f():\n    import lightning.pytorch as pl"),
            ("loss.backward()", "from .training import train"),
            but=("bsbr_pl.evals.training",),
        ),
        "report: pandas, jinja2, matplotlib, numpy, pillow alone": Rule(
            ("bsbr_pl.report",),
            lambda tree: (
                node
                for name, node in imported(tree)
                if name.split(".")[0]
                not in {
                    "pandas",
                    "jinja2",
                    "markupsafe",
                    "matplotlib",
                    "numpy",
                    "PIL",
                    "bsbr_pl",
                    *sys.stdlib_module_names,
                }
            ),
            ("import torch", "def f():\n    import torch", "from lightning import Trainer", "import safetensors"),
            ("import pandas as pd", "from matplotlib.figure import Figure", "import json"),
        ),
        "one file holds private members of other packages": Rule(
            PRODUCT,
            any_of(private_members, private_names),
            ("parser._actions", "from torch.utils._pytree import tree_map", "setattr(action, '_check_type', f)"),
            ("self._actions", "from bsbr_pl.patches import actions_of", "import __future__"),
            but=("bsbr_pl.patches",),
        ),
        "an architecture is named in its own room alone": Rule(
            PRODUCT,
            of_class(*attention_classes),
            (f"from bsbr_pl.attention import {one}", f"isinstance(x, attention.{one})", f"isinstance(x, {one})"),
            ("from bsbr_pl.attention import ARCHITECTURES", f"'{one}'"),
            but=("bsbr_pl.attention", "bsbr_pl.models", "bsbr_pl.convert"),  # names of models; formats of weights
        ),
        "a data set is named in its own room alone": Rule(
            PRODUCT,
            of_class(*data_classes),
            (f"from bsbr_pl.data import {task}", f"isinstance(x, {task})", f"data.{task}"),
            ("from bsbr_pl.data import DATA_SETS", f"'{task}'"),
            but=("bsbr_pl.data",),
        ),
        "a registry's key is spelled in its own room alone": Rule(
            PRODUCT,
            spelled(*keys),
            (f"if key == '{keys[0]}': pass", f"colours = {{'{keys[0]}': 'red'}}", f"models=('{keys[-1]}',)"),
            (f"'{keys[0]} and others'", "ARCHITECTURES[key]"),
            but=("bsbr_pl.attention", "bsbr_pl.models", "bsbr_pl.data"),
        ),
        "sizes of an architecture are read in its own room alone": Rule(
            PRODUCT,
            sizes_by_name,
            ("getattr(attention, 'chunk_size', 1)", "attention.window_size", "hasattr(x, 'retrieval_top_k')"),
            ("attention.reach", "attention.period", "f(chunk_size=3)"),
            but=("bsbr_pl.attention",),
        ),
    }
