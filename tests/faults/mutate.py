"""Change the product in one place at a time, and see whether a test fails.

    python tests/faults/mutate.py changes.jsonl                          # the changes listed in mutations.toml
    python tests/faults/mutate.py random.jsonl --count 300 --seed 1      # random ones, in the modules of MODULES
    python tests/faults/mutate.py random.jsonl --show                    # what survived, by module

A change is made in a copy of the tree, in a forked process that has imported torch and Lightning but nothing of the
product. It runs the fast tests that execute the changed function, the most specific ones first, until one fails. Which
tests execute a function, and how long they take, is found once for each test file (`changes.trace.json`).
Every change is one line of the JSON file as soon as it is known; lines that exist are not measured again.
"""

import argparse
import ast
import collections
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTED = Path(__file__).with_name("mutations.toml")
NOT_COPIED = (".git", "runs", "site", "results", "docs", ".*_cache", "*.egg-info", ".hypothesis", "triton_*.py")
#: Where random changes are made: what decides a number, and no Triton kernel, which needs a GPU.
MODULES = (
    *(f"bsbr_pl/{name}.py" for name in ("metrics", "module", "convert", "run", "steps", "resume")),
    *(f"bsbr_pl/{name}.py" for name in ("optimizer", "checkpoint", "results", "values", "data/*", "attention/[!tk]*")),
    *(f"bsbr_pl/evals/{name}.py" for name in ("accuracy", "certificate", "checkpoints", "evaluation", "costs")),
    *(f"bsbr_pl/utils/{name}.py" for name in ("flops", "macs", "memory", "timing", "records", "research", "files")),
    *("bsbr_pl/evals/analysis.py", "callbacks/*.py"),
)
#: Tests of pages, text, command lines and speed: they take long, or execute everything.
NOT_RUN = {
    *("test_benchmarks", "test_children", "test_docs", "test_import", "test_layers", "test_mistakes", "test_published"),
    *("test_readme", "test_sizes", "test_slow_tests", "test_study", "test_tensorboard", "test_toy", "test_wheel"),
}
ALWAYS = ("tests/test_defaults.py",)  # it executes nothing that it checks
SECONDS = 60.0  # of the tests of one change, as they take without it
SWAPS: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div},
    **{ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amax": "amin", "floor": "ceil", "ceil": "floor"}
SHOWN = ("print", "tqdm", "bar.update", "rank_zero_info", "rank_zero_warn", "warnings.warn")  # what a reader sees
CHECKS = (None, "strict", "encoding", "stacklevel")  # keywords without effect where nothing else is wrong
UNORDERED = ("min", "max", "isinstance", "getattr", "hasattr")  # calls whose first arguments are not swapped
#: Imported once, before a process is made for each change.
LOADED = (
    *("torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.nn.attention.varlen"),
    *("lightning.pytorch.cli", "torchmetrics", "torch.utils.tensorboard", "hypothesis.strategies", "datasets"),
    *("tokenizers", "safetensors.torch", "pandas", "jsonargparse", "docstring_parser", "jinja2", "matplotlib.figure"),
    *("fvcore.nn", "filelock", "tensorboard.backend.event_processing.event_accumulator"),
)

Change = dict[str, Any]  # file, line, what, old, new: `old` at `line` and `column` of the file becomes `new`


def changes_of(source: str, file: str) -> list[Change]:
    """Every change that an operator makes to a module, in order of place."""
    tree, found = ast.parse(source), list[Change]()
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]

    def place(line: int, column: int) -> int:  # ast counts the bytes of a line
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    for node in _changeable(tree):
        for what, part, new in _variants(node):
            a, b = place(part.lineno, part.col_offset), place(part.end_lineno, part.end_col_offset)
            text = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
            text = f"({text})" if isinstance(new, ast.expr) and not isinstance(new, ast.Constant | ast.Name) else text
            found.append({"file": file, "line": node.lineno, "at": a, "what": what, "old": source[a:b], "new": text})
    return [change for change in found if change["old"] != change["new"]]


def _changeable(tree: ast.AST) -> Iterator[Any]:
    """The nodes of code that computes: no annotations, messages of errors, prints or docstrings."""
    for name, value in ast.iter_fields(tree):
        for node in value if isinstance(value, list) else [value]:
            skipped = isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)
            if not isinstance(node, ast.AST) or skipped or name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            if isinstance(node, ast.Call) and ast.unparse(node.func) in SHOWN:
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if hasattr(node, "lineno"):
                yield node
            yield from _changeable(node)


def _variants(node: Any) -> Iterator[tuple[str, Any, Any]]:
    """The operator, the part of a node that it changes, and what takes its place: another node, or text."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield "comparison", node, ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield "arithmetic", node, ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield "and/or", node, ast.BoolOp(SWAPS[type(node.op)](), node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield "constant", node, ast.Constant(_other(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield "sign", node, node.operand
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "condition", node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "statement", node, "pass"


def _other(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 2 * value or 1.0


def _calls(node: ast.Call) -> Iterator[tuple[str, Any, Any]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    if len(set(map(ast.dump, node.args[:2]))) == 2 and not starred and name not in UNORDERED:
        yield "arguments", node, ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg not in CHECKS:
            yield "keyword", node, ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
    if name in NAMES:
        new: Any = ast.Name(NAMES[name])
        if isinstance(node.func, ast.Attribute):
            new = ast.Attribute(node.func.value, NAMES[name])
        yield "min/max", node, ast.Call(new, node.args, node.keywords)


def listed(root: Path) -> list[Change]:
    """The changes of mutations.toml. `old` must be in its file exactly once."""
    found = []
    for change in tomllib.loads(LISTED.read_text())["change"]:
        source = (root / change["file"]).read_text()
        place = source.find(change["old"])
        if source.count(change["old"]) != 1:
            print(f"{change['file']}: not there exactly once: {change['old']}", file=sys.stderr)
            continue
        found.append({"line": source.count("\n", 0, place) + 1, "at": place, "what": "by hand", **change})
    return found


def drawn(root: Path, patterns: list[str], count: int, seed: int) -> list[Change]:
    """`count` random changes of the modules that match, each equally likely."""
    files = sorted({file for pattern in patterns for file in root.glob(pattern)})
    found = [change for file in files for change in changes_of(file.read_text(), str(file.relative_to(root)))]
    random.Random(seed).shuffle(found)
    return found[:count]


def functions(source: str) -> dict[int, str]:
    """Line -> the outermost function around it, as in `co_qualname`; lines of no function are absent."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                found.update(dict.fromkeys(range(child.lineno, (child.end_lineno or 0) + 1), prefix + child.name))

    visit(ast.parse(source), "")
    return found


class Tests:
    """Which tests execute which functions of a tree, and their seconds; found by running each test file once."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.known: dict[str, Any] = json.loads(cache.read_text()) if cache.exists() else {}

    def trace(self) -> None:
        """Run the tests that are new, in test files that have changed."""
        for file in sorted(self.root.glob("tests/**/test_*.py")):
            name, content = str(file.relative_to(self.root)), hashlib.sha256(file.read_bytes()).hexdigest()
            before = self.known.get(name, {"sha256": "", "tests": {}})
            if file.stem in NOT_RUN or before["sha256"] == content:
                continue
            out, known = self.root / "trace.json", before["tests"]
            _forked(self.root, partial(_pytest, [name], [Tracer(self.root, known, out)]), 1200)
            found = json.loads(out.read_text()) if out.exists() else {}
            out.unlink(missing_ok=True)
            self.known[name] = {"sha256": content, "tests": known | found}
            self.cache.write_text(json.dumps(self.known))
            print(f"{name}: {len(found)} tests", flush=True)

    def of(self, change: Change) -> list[str]:
        """The tests that execute the changed function; of code outside functions, any function of the module.

        Those of the module's own test file come first, and of each file those that execute the least else. Together
        they take at most SECONDS, and those of a file follow each other, because they share fixtures.
        """
        function = functions((self.root / change["file"]).read_text()).get(change["line"])
        found = self._executing(change["file"], function)
        found = found or self._executing(change["file"], None)  # a thread that was not traced may execute it
        chosen, total = dict[str, list[str]](), 0.0
        for _, file, name, seconds in found:
            total += seconds
            if total < SECONDS or not chosen:
                chosen.setdefault(file, []).append(name)
        always = [name for file in ALWAYS for name in self.known.get(file, {"tests": ()})["tests"]]
        return [*(name for names in chosen.values() for name in names), *always]

    def _executing(self, module: str, function: str | None) -> list[Any]:
        own, found = f"test_{Path(module).stem}.py", []
        for file, known in self.known.items():
            for name, (seconds, executed) in known["tests"].items():
                if any(f == module and function in (None, g) for f, g in map(str.split, executed)):
                    found.append(((not file.endswith(own), len(executed)), file, name, seconds))
        return sorted(found)


class Tracer:
    """A pytest plugin: notes which functions of the product each passing test executes, its fixtures included."""

    def __init__(self, root: Path, known: Collection[str], out: Path) -> None:
        self.root, self.known, self.out = f"{root}/", known, out
        self.active: list[set[str]] = []
        self.of_fixture: dict[str, set[str]] = collections.defaultdict(set)
        self.found: dict[str, tuple[float, set[str]]] = {}
        self.failed: set[str] = set()

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_filename.startswith(self.root):
            executed = f"{code.co_filename[len(self.root) :]} {code.co_qualname.split('.<locals>')[0]}"
            for one in self.active:
                one.add(executed)

    def _record(self, executed: set[str]) -> Iterator[None]:
        self.active.append(executed)
        sys.settrace(self._called)
        yield
        self.active.pop()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.known]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        executed, start = set[str](), time.perf_counter()
        yield from self._record(executed)
        for name in item.fixturenames:
            executed |= self.of_fixture[name]
        if item.nodeid not in self.failed:
            product = {one for one in executed if one.startswith(("bsbr_pl", "callbacks", "train.", "evaluate."))}
            self.found[item.nodeid] = time.perf_counter() - start, product

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        yield from self._record(self.of_fixture[fixturedef.argname])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.out.write_text(json.dumps({name: (s, sorted(executed)) for name, (s, executed) in self.found.items()}))


class Chosen:
    """A pytest plugin: runs these tests only, in this order."""

    def __init__(self, names: list[str]) -> None:
        self.place = {name: i for i, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((one for one in items if one.nodeid in self.place), key=lambda one: self.place[one.nodeid])


def outcome(root: Path, change: Change, tests: list[str], seconds: float) -> dict[str, Any]:
    """Make a change in a tree, run these tests, and take the change back: killed, survived, untested or too slow."""
    file = root / change["file"]
    before, status = file.read_text(), file.stat()
    end = change["at"] + len(change["old"])
    assert before[change["at"] : end] == change["old"]
    start, code, report = time.perf_counter(), 0 if tests else None, root / "report.txt"
    files = list(dict.fromkeys(name.split("::")[0] for name in tests))
    try:
        file.write_text(before[: change["at"]] + change["new"] + before[end:])
        for some in (files[:2], files[2:]):  # to import all of them takes longer than most tests
            if some and code == 0:
                code = _forked(root, partial(_pytest, ["-x", *some], [Chosen(tests)]), seconds, report)
    finally:
        file.write_text(before)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that its compiled form stays valid
    if not tests:
        return {"outcome": "untested"}
    said = [line for line in report.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    found = {"outcome": {0: "survived", None: "timeout"}.get(code, "killed")}
    return found | {"seconds": round(time.perf_counter() - start, 1), "by": said[0][:200] if said else ""}


def _pytest(arguments: list[str], plugins: list[Any]) -> int:
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no other processes, and seconds less
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow", "--tb=line"]
    return int(pytest.main([*options, *arguments], plugins))


def _forked(root: Path, run: Callable[[], int], seconds: float, output: Path | None = None) -> int | None:
    """The exit code of `run` in a process of its own in the folder `root`; None if it took too long and was killed."""
    child = os.fork()
    if not child:
        code = 3
        try:
            os.setsid()
            os.chdir(root)
            sys.path[:] = [str(root), str(root / "tests"), *(one for one in sys.path if Path(one) != LISTED.parent)]
            os.environ["PYTHONPATH"] = str(root)
            with open(output or os.devnull, "w") as stream:
                for number in (1, 2):
                    os.dup2(stream.fileno(), number)
                code = run()
                sys.stdout.flush()
        finally:
            os._exit(code)
    end, ended = time.monotonic() + seconds, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it has started
    if not ended:
        os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def show(path: Path) -> None:
    """Print the outcomes by module, and what survived."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for change in found:
        counts[change["file"]][change["outcome"]] += 1
        if change["outcome"] not in ("killed", "timeout"):
            old, new = (" ".join(change[name].split()) for name in ("old", "new"))
            print(f"{change['outcome']}: {change['file']}:{change['line']} {change['what']}\n    {old}\n    {new}")
    print(f"\n{'module':<40} {'changes':>8} {'noticed':>8}")
    counts["all"] = sum(counts.values(), collections.Counter())
    for file, count in counts.items():
        print(f"{file:<40} {count.total():>8} {count['killed'] + count['timeout']:>8}")


def run(changes: list[Change], root: Path, tests: Tests, out: Path) -> None:
    """Measure the changes that are not in the file `out` yet."""
    lines = out.read_text().splitlines() if out.exists() else []
    key = ("file", "old", "new", "what", "line")
    known = {tuple(change[name] for name in key) for change in map(json.loads, lines)}
    for i, change in enumerate(changes):
        if tuple(change[name] for name in key) in known:
            continue
        found = change | outcome(root, change, tests.of(change), 60 + 3 * SECONDS)
        with out.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        print(f"{i + 1}/{len(changes)} {change['file']}:{change['line']} {found['outcome']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="JSON lines, one a change")
    parser.add_argument("modules", nargs="*", default=MODULES, help="patterns of files for random changes")
    parser.add_argument("--count", type=int, help="how many random changes; without it, those of mutations.toml")
    parser.add_argument("--seed", type=int, default=0, help="of the random changes")
    parser.add_argument("--show", action="store_true", help="only print what was found")
    given = parser.parse_args()
    if not given.show:
        for module in LOADED:
            importlib.import_module(module)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder).resolve() / "tree"
            shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*NOT_COPIED))
            tests = Tests(root, given.out.with_suffix(".trace.json"))
            tests.trace()
            changes = listed(root) if given.count is None else drawn(root, given.modules, given.count, given.seed)
            run(changes, root, tests, given.out)
    show(given.out)


if __name__ == "__main__":
    main()
