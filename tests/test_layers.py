"""Which way imports point, and what each room may touch: text -> tokens -> model -> record -> report."""

import ast
from pathlib import Path

import pytest
from rules import rules, within

from bsbr_pl.attention import ARCHITECTURES
from bsbr_pl.data import DATA_SETS
from bsbr_pl.models import MODELS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bsbr_pl"
RULES = rules(
    tuple(cls.__name__ for cls in ARCHITECTURES.values()), tuple(DATA_SETS), (*ARCHITECTURES, *MODELS, *DATA_SETS)
)

#: Room (the longest name that matches a module) -> the modules of other rooms that it may import: exactly these.
ALLOWED: dict[str, set[str]] = {
    # Values and rows, without torch.
    "bsbr_pl.values": set(),
    "bsbr_pl.schema": set(),
    "bsbr_pl.results": {"bsbr_pl.schema", "bsbr_pl.values", "bsbr_pl.utils.files"},
    "bsbr_pl.report": {"bsbr_pl.results", "bsbr_pl.values", "bsbr_pl.utils.files"},
    # The model.
    "bsbr_pl.attention": {"bsbr_pl.attention.base", "bsbr_pl.attention.parts"},
    "bsbr_pl.attention.base": {"bsbr_pl.attention.parts"},
    "bsbr_pl.attention.parts": {"bsbr_pl.attention.ops"},
    "bsbr_pl.feed_forward": set(),
    "bsbr_pl.bottleneck": set(),
    "bsbr_pl.branches": {"bsbr_pl.attention.base", "bsbr_pl.feed_forward"},
    "bsbr_pl.generation": {"bsbr_pl.branches"},
    "bsbr_pl.inputs": set(),
    "bsbr_pl.model": {
        *(f"bsbr_pl.{name}" for name in ("attention.base", "attention.parts", "bottleneck", "branches")),
        *(f"bsbr_pl.{name}" for name in ("feed_forward", "generation", "inputs")),
    },
    "bsbr_pl.foreign": {"bsbr_pl.attention.base"},
    "bsbr_pl.spec": {"bsbr_pl.attention", "bsbr_pl.foreign", "bsbr_pl.values"},
    "bsbr_pl.models": {"bsbr_pl.attention", "bsbr_pl.model", "bsbr_pl.spec", "bsbr_pl.values"},
    "bsbr_pl": {"bsbr_pl.evals.certificate", "bsbr_pl.models"},
    "bsbr_pl.compiled": {"bsbr_pl.model", "bsbr_pl.patches"},
    "bsbr_pl.limits": {"bsbr_pl.model", "bsbr_pl.spec"},
    "bsbr_pl.metrics": set(),
    # Instruments.
    "bsbr_pl.utils": {"bsbr_pl", "bsbr_pl.models", "bsbr_pl.patches", "bsbr_pl.results", "bsbr_pl.values"},
    "bsbr_pl.patches": set(),
    # Data.
    "bsbr_pl.data.base": {"bsbr_pl.steps", "bsbr_pl.values", "bsbr_pl.data.text"},  # the text for a type only
    "bsbr_pl.data.files": set(),
    "bsbr_pl.data.rows": {"bsbr_pl.data.files"},
    "bsbr_pl.data.sources": {"bsbr_pl.data.base", "bsbr_pl.data.files"},
    "bsbr_pl.data.folders": {f"bsbr_pl.data.{name}" for name in ("base", "files", "sources")},
    "bsbr_pl.data.corpora": {"bsbr_pl.data.files", "bsbr_pl.data.sources"},
    "bsbr_pl.data.opening": {f"bsbr_pl.data.{name}" for name in ("corpora", "files", "folders", "rows", "sources")},
    "bsbr_pl.data.bpe_file": set(),
    "bsbr_pl.data.tokenizer": {"bsbr_pl.data.bpe_file"},
    "bsbr_pl.data.corpus": {f"bsbr_pl.data.{name}" for name in ("base", "corpora", "files", "sources", "tokenizer")},
    "bsbr_pl.data.windows": {"bsbr_pl.data.base", "bsbr_pl.data.corpus"},
    "bsbr_pl.data.tasks": {"bsbr_pl.data.base"},
    "bsbr_pl.data.mad_tasks": {"bsbr_pl.data.base", "bsbr_pl.data.tasks"},
    "bsbr_pl.data": {
        "bsbr_pl.utils.files",
        *(f"bsbr_pl.data.{name}" for name in ("base", "corpus", "mad_tasks", "opening", "sources", "tasks")),
        *(f"bsbr_pl.data.{name}" for name in ("tokenizer", "windows")),
    },
    # Training.
    "bsbr_pl.steps": set(),
    "bsbr_pl.archive": set(),
    "bsbr_pl.checkpoint": {"bsbr_pl.archive", "bsbr_pl.utils.files", "bsbr_pl.values"},
    "bsbr_pl.optimizer": {"bsbr_pl.attention.parts"},
    "bsbr_pl.run": {"bsbr_pl.schema", "bsbr_pl.spec", "bsbr_pl.values"},
    "bsbr_pl.resume": {"bsbr_pl.run", "bsbr_pl.steps"},
    "bsbr_pl.module": {
        *("bsbr_pl.attention.base", "bsbr_pl.model", "bsbr_pl.models", "bsbr_pl.spec", "bsbr_pl.compiled"),
        *("bsbr_pl.limits", "bsbr_pl.metrics", "bsbr_pl.checkpoint", "bsbr_pl.optimizer", "bsbr_pl.resume"),
        *("bsbr_pl.steps", "bsbr_pl.values"),
    },
    "bsbr_pl.convert": {
        *("bsbr_pl.attention", "bsbr_pl.feed_forward", "bsbr_pl.module", "bsbr_pl.spec", "bsbr_pl.values"),
    },
    "bsbr_pl.hf": {
        *("bsbr_pl.attention", "bsbr_pl.limits", "bsbr_pl.model", "bsbr_pl.models", "bsbr_pl.spec"),
        *("bsbr_pl.attention.parts", "bsbr_pl.data.tokenizer", "bsbr_pl.utils.files"),  # the tokenizer for a type only
    },
    # The command line of training.
    "bsbr_pl.plain_yaml": set(),
    "bsbr_pl.parsing": {"bsbr_pl.other_names", "bsbr_pl.patches", "bsbr_pl.plain_yaml", "bsbr_pl.values"},
    "bsbr_pl.run_folder": {"bsbr_pl.checkpoint", "bsbr_pl.run", "bsbr_pl.utils.files"},
    "bsbr_pl.configuration": {
        *("bsbr_pl.attention", "bsbr_pl.foreign", "bsbr_pl.spec", "bsbr_pl.steps", "bsbr_pl.values"),
    },
    "bsbr_pl.cli": {
        "bsbr_pl.configuration",
        *("bsbr_pl.attention", "bsbr_pl.checkpoint", "bsbr_pl.convert", "bsbr_pl.limits", "bsbr_pl.parsing"),
        *("bsbr_pl.patches", "bsbr_pl.run", "bsbr_pl.run_folder", "bsbr_pl.steps", "bsbr_pl.values"),
        "bsbr_pl.utils.files",
    },
    "callbacks": {
        *(
            "bsbr_pl.attention",
            "bsbr_pl.data",
            "bsbr_pl.data.base",
            "bsbr_pl.data.corpora",
            "bsbr_pl.data.files",
            "bsbr_pl.foreign",
            "bsbr_pl.module",
        ),
        "bsbr_pl.attention.parts",
        *("bsbr_pl.run_folder", "bsbr_pl.schema", "bsbr_pl.spec", "bsbr_pl.steps"),
        *("bsbr_pl.utils.files", "bsbr_pl.utils.flops", "bsbr_pl.utils.macs"),
        *("bsbr_pl.utils.memory", "bsbr_pl.utils.records", "bsbr_pl.utils.timing", "bsbr_pl.utils.visualization"),
        "bsbr_pl.values",
    },
    "train": {
        *("callbacks", "bsbr_pl.cli", "bsbr_pl.data", "bsbr_pl.module", "bsbr_pl.parsing", "bsbr_pl.run_folder"),
        *("bsbr_pl.foreign", "bsbr_pl.utils.allocator", "bsbr_pl.values"),
    },
    # Evaluation.
    "bsbr_pl.evals": {
        "bsbr_pl.run",
        *("bsbr_pl.attention", "bsbr_pl.attention.parts", "bsbr_pl.data", "bsbr_pl.data.corpora"),
        *("bsbr_pl.data.corpus", "bsbr_pl.data.files", "bsbr_pl.data.tokenizer"),
        *("bsbr_pl.metrics", "bsbr_pl.model", "bsbr_pl.models", "bsbr_pl.module", "bsbr_pl.results", "bsbr_pl.spec"),
        "bsbr_pl.utils.code",
        *("bsbr_pl.utils.memory", "bsbr_pl.utils.records", "bsbr_pl.utils.timing", "bsbr_pl.utils.visualization"),
        *("bsbr_pl.report", "bsbr_pl.report.rows", "bsbr_pl.schema", "bsbr_pl.utils.files", "bsbr_pl.values"),
        "bsbr_pl.feed_forward",
        # To run and count modules of other libraries.
        *("bsbr_pl.compiled", "bsbr_pl.foreign", "bsbr_pl.patches", "bsbr_pl.utils.flops", "bsbr_pl.utils.macs"),
    },
    "bsbr_pl.evals.commands": {
        *("bsbr_pl.evals.certificate", "bsbr_pl.evals.checkpoints", "bsbr_pl.evals.evaluation"),
        *("bsbr_pl.evals.matching", "bsbr_pl.foreign"),
        *("bsbr_pl.evals.retrieval", "bsbr_pl.evals.saved_data", "bsbr_pl.evals.submit", "bsbr_pl.evals.harness"),
        *("bsbr_pl.attention", "bsbr_pl.data.tokenizer", "bsbr_pl.hf", "bsbr_pl.models", "bsbr_pl.utils.records"),
        *("bsbr_pl.report", "bsbr_pl.results", "bsbr_pl.utils.allocator", "bsbr_pl.utils.files", "bsbr_pl.values"),
    },
    "bsbr_pl.__main__": {
        *(
            "bsbr_pl.evals.commands",
            "bsbr_pl.foreign",
            "bsbr_pl.parsing",
            "bsbr_pl.report",
            "bsbr_pl.results",
            "bsbr_pl.values",
        ),
    },
    "evaluate": {"bsbr_pl.__main__"},
}
#: Rule -> the modules that break it, and why they may.
KNOWN: dict[str, dict[str, str]] = {
    "attention: no device by name": {
        "bsbr_pl.attention.bsbr": "on a CPU, one copy serves the local attention and the chunks",
        "bsbr_pl.attention.parts": "a loop on a CPU, a scan on a GPU",
    },
    "callbacks: no other callbacks": {
        "callbacks.fail_together": "after an error in one process, a checkpoint of the others would wait forever",
    },
    "a registry's key is spelled in its own room alone": {
        "bsbr_pl.__main__": "the name of the program",
        "bsbr_pl.evals.analysis": "the model that the others are compared with, if it is there",
        "bsbr_pl.evals.commands": "the default of an option, and the name of the program",
        "bsbr_pl.evals.comparison": "the models that are compared by default",
        "bsbr_pl.report.costs": "the architecture that the others are compared with, if it is there",
        "bsbr_pl.report.plots": "the name of a scale",
        "bsbr_pl.utils.macs": "an operator of torch",
    },
    "a data set is named in its own room alone": {
        "bsbr_pl.evals.accuracy": "the type of an argument",
        "bsbr_pl.evals.training": "the default task of compare_models",
    },
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
MODULES = {module_of(path): path for path in SOURCES}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """The modules of this project that a file imports, by full name; a name of a package counts as the package."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return {name for name in found if name in MODULES} | {name for name in found if within(name, "tests", "study")}


def room_of(module: str) -> str:
    return max((room for room in ALLOWED if within(module, room)), key=len)


def foreign(module: str) -> set[str]:
    """The modules that a module imports from other rooms."""
    path = MODULES[module]
    found = imports(path.read_text(), module, path.name == "__init__.py")
    return {name for name in found if room_of(name) != room_of(module)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    room = room_of(module)
    assert foreign(module) <= ALLOWED[room], f"{module} may not import {foreign(module) - ALLOWED[room]}"


def test_no_list_is_longer_than_it_must_be():
    used: dict[str, set[str]] = {room: set() for room in ALLOWED}
    for module in MODULES:
        used[room_of(module)] |= foreign(module)
    assert {room: names - used[room] for room, names in ALLOWED.items() if names - used[room]} == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_attention_file_stands_alone(name):
    path = PACKAGE / "attention" / f"{name}.py"
    may = {f"bsbr_pl.attention.{room}" for room in ("base", "parts", "decays", "kernels", "chunk_kernels", "softmax")}
    assert imports(path.read_text(), f"bsbr_pl.attention.{name}") <= may
    assert ARCHITECTURES[name].__module__ == f"bsbr_pl.attention.{name}"
    assert (ROOT / "configs" / f"{name}.yaml").exists()


@pytest.mark.parametrize("name", RULES)
def test_a_room_touches_only_what_it_may(name):
    rule, known = RULES[name], KNOWN.get(name, {})
    broken = {}
    for module, path in MODULES.items():
        if rule.holds_for(module):
            lines = [f"line {node.lineno}: {ast.unparse(node)[:80]}" for node in rule.find(ast.parse(path.read_text()))]
            if lines:
                broken[module] = lines
    assert {module: lines for module, lines in broken.items() if module not in known} == {}
    assert set(known) <= set(broken), "a module that keeps the rule now: take it out of KNOWN"


# The test of the tests: a broken source is noticed, a sound one is not.


@pytest.mark.parametrize("name", RULES)
def test_a_broken_source_is_noticed(name):
    for source in RULES[name].broken:
        assert list(RULES[name].find(ast.parse(source))), source
    for source in RULES[name].sound:
        assert not list(RULES[name].find(ast.parse(source))), source


def test_every_rule_holds_somewhere():
    for name, rule in RULES.items():
        assert any(rule.holds_for(module) for module in MODULES), name


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from .base import Attention", "bsbr_pl.attention.bsbr", {"bsbr_pl.attention.base"}),
        ("from .. import values", "bsbr_pl.utils.files", {"bsbr_pl.values"}),
        ("from bsbr_pl import values, BSBRModel", "bsbr_pl.utils.files", {"bsbr_pl.values", "bsbr_pl"}),
        ("def f():\n    import bsbr_pl.evals.matching as m", "bsbr_pl.model", {"bsbr_pl.evals.matching"}),
        ("import callbacks", "bsbr_pl.module", {"callbacks"}),
        ("if x:\n    from callbacks.run_recorder import History", "bsbr_pl.cli", {"callbacks.run_recorder"}),
        ("import torch\nfrom math import pi", "bsbr_pl.model", set()),
    ],
)
def test_imports_are_found(source, module, found):
    assert imports(source, module) == found


# Complexity of report/: a reader unfolds comprehensions and lambdas one at a time.


def per_thousand_lines(sources: list[str], *kinds: type[ast.AST]) -> float:
    nodes = sum(isinstance(node, kinds) for source in sources for node in ast.walk(ast.parse(source)))
    return 1000 * nodes / sum(len(source.splitlines()) for source in sources)


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def test_the_report_is_read_once():
    sources = [path.read_text() for path in (PACKAGE / "report").rglob("*.py")]
    assert per_thousand_lines(sources, *COMPREHENSIONS) <= 60
    assert per_thousand_lines(sources, ast.Lambda) <= 15


def test_comprehensions_and_lambdas_are_counted():
    source = "x = [y for y in {z: 1 for z in range(3)}]\n" + "\n" * 9
    assert per_thousand_lines([source], *COMPREHENSIONS) == 200
    assert per_thousand_lines([source, "f = lambda x: lambda y: x + y\n" + "\n" * 9], ast.Lambda) == 100
