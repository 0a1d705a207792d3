"""Which way imports point: text -> tokens -> model -> record -> report, and every attention alone in its file."""

import ast
from pathlib import Path

import pytest

from bsbr_pl.attention import ARCHITECTURES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bsbr_pl"

#: What a room (the longest matching name) may import of this project.
ALLOWED = {
    "bsbr_pl": {"bsbr_pl.models"},
    "bsbr_pl.attention": {"bsbr_pl.attention"},
    "bsbr_pl.attention.base": {"bsbr_pl.attention.parts"},
    "bsbr_pl.model": {"bsbr_pl.attention.base", "bsbr_pl.attention.parts"},
    "bsbr_pl.models": {"bsbr_pl.model", "bsbr_pl.attention"},
    "bsbr_pl.data": {"bsbr_pl.data", "bsbr_pl.steps"},
    "bsbr_pl.values": set(),
    "bsbr_pl.results": {"bsbr_pl.values", "bsbr_pl.utils.files"},
    "bsbr_pl.utils.files": {"bsbr_pl.values"},
    "bsbr_pl.steps": set(),
    "bsbr_pl.run": {"bsbr_pl.attention", "bsbr_pl.description"},
    "bsbr_pl.run_folder": {"bsbr_pl.run", "bsbr_pl.utils"},
    "bsbr_pl.utils": {"bsbr_pl.values", "bsbr_pl.utils", "bsbr_pl.attention", "bsbr_pl.model", "bsbr_pl.models"},
    "bsbr_pl.checkpoint": {"bsbr_pl.utils", "bsbr_pl.values"},
    "bsbr_pl.metrics": set(),
    "bsbr_pl.compiled": {"bsbr_pl.model"},
    "bsbr_pl.description": {"bsbr_pl.model", "bsbr_pl.attention.base"},
    "bsbr_pl.module": {
        *("bsbr_pl.model", "bsbr_pl.attention.base", "bsbr_pl.attention.parts"),
        *("bsbr_pl.checkpoint", "bsbr_pl.compiled", "bsbr_pl.description", "bsbr_pl.limits", "bsbr_pl.metrics"),
        *("bsbr_pl.run", "bsbr_pl.steps"),
    },
    "bsbr_pl.limits": {"bsbr_pl.model", "bsbr_pl.description"},
    "bsbr_pl.convert": {"bsbr_pl.module", "bsbr_pl.model", "bsbr_pl.attention", "bsbr_pl.values"},
    "bsbr_pl.parsing": {"bsbr_pl.plain_yaml"},
    "bsbr_pl.plain_yaml": set(),
    "bsbr_pl.cli": {
        *("bsbr_pl.attention", "bsbr_pl.checkpoint", "bsbr_pl.convert", "bsbr_pl.parsing"),
        *("bsbr_pl.run_folder", "bsbr_pl.limits", "bsbr_pl.run", "bsbr_pl.steps"),
    },
    "bsbr_pl.evals": {"bsbr_pl"},
    "callbacks": {"callbacks", "bsbr_pl"},
    "train": {"callbacks", "bsbr_pl"},
    "evaluate": {"callbacks", "bsbr_pl"},
}


def imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, by full name."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"bsbr_pl.{alias.name}" for alias in node.names} if module == "bsbr_pl" else {module}
    found.discard("bsbr_pl.__version__")
    return {name for name in found if name.split(".")[0] in ("bsbr_pl", "callbacks", "train", "evaluate")}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "callbacks").rglob("*.py"), *ROOT.glob("*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    room = max((room for room in ALLOWED if within(name, room)), key=len)
    for imported in imports(path):
        assert any(within(imported, allowed) for allowed in ALLOWED[room]), f"{name} may not import {imported}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_attention_file_stands_alone(name):
    path = PACKAGE / "attention" / f"{name}.py"
    shared = {f"bsbr_pl.attention.{room}" for room in ("base", "parts", "decays", "kernels")}
    assert {"bsbr_pl.attention.base"} <= imports(path) <= shared
    assert ARCHITECTURES[name].__module__ == f"bsbr_pl.attention.{name}"
    assert (ROOT / "configs" / f"{name}.yaml").exists()
